//! The texts behind `--help`.
//!
//! Each structured option has a text of its own (`--export help` prints it), and `--help` shows
//! them one after the other. Lines stay under 100 characters: clap breaks longer ones.

/// Heading of the options for one disk.
pub(super) const DISK: &str = "One disk";
/// Heading of the options that define nodes and exports.
pub(super) const NODES: &str = "Nodes and exports (as in qemu-storage-daemon)";
/// Heading of the options for control sockets.
pub(super) const CONTROL: &str = "Control sockets";
/// Heading of the options for the process itself.
pub(super) const PROCESS: &str = "Process";

macro_rules! notation {
    () => {
        "\
OPTIONS is a list key=value,key=value,... or a JSON object {\"key\": value, ...}.
  - the key in brackets ([driver=]) may be left out of the first pair
  - a comma inside a value is written twice: filename=a,,b
  - keys inside a key are joined by dots: file.cache.direct=on; lists are numbered: key.0=x
  - of two equal keys the later one wins
  - switches are on or off; sizes take K, M, G, T (powers of 1024) or 0x
"
    };
}

macro_rules! blockdev {
    () => {
        "\
--blockdev [driver=]DRIVER,node-name=NAME[,KEY=VALUE...]

  NAME and NODE are names of up to 31 characters: letters, digits, '-', '.', '_', beginning
  with a letter. Where a key takes a NODE, either name one that is defined to the left of
  this option, or write the node in place: file.driver=file,file.filename=PATH. A node in
  place takes over cache, force-share and, unless it is 'backing', read-only.

  for every driver:
    node-name=NAME            how others refer to it (optional for a node in place)
    read-only=on|off          [off; on for a backing node in place]
    auto-read-only=on|off     open read-only when it cannot be written [off]
    force-share=on|off        let others write too; needs read-only=on [off]
    discard=ignore|unmap      what becomes of discarded space [ignore; unmap in place]
    detect-zeroes=off|on|unmap  record writes of nothing but zeros as such, for the node
                              that is exported [off]
    cache.direct=on|off       go past the host's page cache [off]
    cache.no-flush=on|off     never flush: data is lost when the host goes down [off]

  driver=file, driver=host_device
    filename=PATH             the file or device
    locking=auto|on|off       take the locks by which QEMU guards images [auto]
    aio=threads|native|io_uring  accepted; all I/O is done with io_uring
    (accepted without effect: aio-max-batch, drop-cache, x-check-cache-dropped)

  driver=raw
    file=NODE                 where the data is
    offset=N, size=N          serve this part of it [all]

  driver=qcow2
    file=NODE                 where the image is
    backing=NODE|null         the layer below, instead of the one the image names
    copy-on-read=on|off       keep what reads take from the layers below [off]
    data-file=NODE            where the guest's data is, instead of the file the image names
    pass-discard-request=on|off  free space in the file when the guest discards
                              [on if discard=unmap]
    l2-cache-size=N, cache-size=N  bytes of metadata in memory at most [32M]
    (accepted without effect: lazy-refcounts, pass-discard-snapshot, pass-discard-other,
    discard-no-unref, overlap-check, l2-cache-entry-size, refcount-cache-size,
    cache-clean-interval)

  driver=qed                  QEMU's format before qcow2 version 3; it is only read
    file=NODE, backing=NODE|null

  driver=copy-on-read         a filter: keep in 'file' what reads take from below it
    file=NODE
    (accepted without effect: bottom)

  driver=null-co, driver=null-aio  a disk that keeps nothing, to measure with; reads are zeros
    size=N                    bytes [1G]
    latency-ns=N              how long each operation takes, in nanoseconds [0]
    read-zeroes=on|off        jobs know that it is zeros before they read it [off]

  driver=blkdebug             operations on 'image' fail by rules; docs/command-line.md has the
                              events
    image=NODE                where the bytes are
    config=PATH               a file of rules, as QEMU has them; they come first
    inject-error.N.event=EVENT  rule N, counted from 0: what arms it
      inject-error.N.state=S, iotype=read|write|write-zeroes|discard|flush|block-status,
      errno=E [5], sector=S, once=on|off, immediately=on|off   (each behind inject-error.N.)
    set-state.N.event=EVENT, set-state.N.state=S, set-state.N.new_state=S
    align=N, max-transfer=N   blocks, and bytes that one operation moves at most
    (accepted without effect: opt-write-zero, max-write-zero, opt-discard, max-discard)
"
    };
}

macro_rules! export {
    () => {
        "\
--export [type=]vhost-user-blk,id=NAME,node-name=NODE,addr.type=...[,KEY=VALUE...]

    id=NAME                   how the control socket calls the device
    node-name=NODE            what is served
    addr.type=unix,addr.path=PATH   listen on this socket
    addr.type=fd,addr.str=N   use the socket that is open as descriptor N
    writable=on|off           let the guest write [off]
    writethrough=on|off       make every write stable before it completes [off]
    num-queues=N              number of virtqueues, each with its own thread [1]
    logical-block-size=N      a power of two from 512 to 2097152 [512]
    serial=TEXT               serial number, of at most 20 bytes [made from the id]
    iothread=NAME             take the polling time of this --object iothread
    (accepted without effect: fixed-iothread)
"
    };
}

macro_rules! chardev {
    () => {
        "\
--chardev [backend=]socket,id=NAME,path=PATH|fd=N[,server=on|off][,wait=on|off]

    path=PATH                 a Unix socket in the file system
    fd=N                      a socket that is open as descriptor N
    server=on|off             listen for clients, or connect to a listener [off]
    wait=on|off               with server=on: start when the first client is there [on]
    (accepted without effect: reconnect, reconnect-ms, tight)

--chardev [backend=]stdio,id=NAME

    standard input and output, for one monitor
    (accepted without effect: signal)

--monitor [chardev=]NAME[,id=NAME][,mode=control][,pretty=on|off]

    chardev=NAME              the --chardev that carries it
    pretty=on|off             answers over several lines [off]
"
    };
}

macro_rules! object {
    () => {
        "\
--object [qom-type=]iothread,id=NAME[,KEY=VALUE...]

    poll-max-ns=N             how long the queues of exports that name it look for
                              work before they sleep [64000]
    (accepted without effect: poll-grow, poll-shrink, aio-max-batch, thread-pool-min,
    thread-pool-max; every queue has a thread of its own)
"
    };
}

macro_rules! trace {
    () => {
        "\
--trace [[enable=]PATTERN][,events=FILE][,file=FILE]

    logs everything to standard error; the variable STRATABLK_LOG says more exactly
    what to log, for instance stratablk::export=debug,warn
    (accepted without effect: enable, events, file)
"
    };
}

macro_rules! examples {
    () => {
        "\
Examples:
  A disk with its backing files, and a control socket:
    stratablk --socket-path=/run/vm1.sock --blk-file=overlay.qcow2 --qmp /run/vm1.qmp

  The same, in qemu-storage-daemon's words:
    stratablk \\
      --blockdev qcow2,node-name=top,file.driver=file,file.filename=overlay.qcow2 \\
      --export vhost-user-blk,id=d0,node-name=top,addr.type=unix,addr.path=vm1.sock,writable=on \\
      --chardev socket,id=qmp,path=/run/vm1.qmp,server=on,wait=off --monitor qmp

  A chain written out, past the page cache, with copy-on-read:
    stratablk \\
      --blockdev file,node-name=base-file,filename=golden.raw,cache.direct=on,read-only=on \\
      --blockdev raw,node-name=base,file=base-file,read-only=on \\
      --blockdev file,node-name=top-file,filename=overlay.qcow2,cache.direct=on \\
      --blockdev qcow2,node-name=top,file=top-file,backing=base,copy-on-read=on \\
      --export vhost-user-blk,id=d0,node-name=top,addr.type=unix,addr.path=vm1.sock,writable=on

  A socket opened by the starting program (descriptor 3), in JSON:
    stratablk --blockdev '{\"driver\":\"file\",\"node-name\":\"f\",\"filename\":\"disk.raw\"}' \\
      --export '{\"type\":\"vhost-user-blk\",\"id\":\"d0\",\"node-name\":\"f\",
                 \"addr\":{\"type\":\"fd\",\"str\":\"3\"}}'

  A virtual machine with the disk:
    qemu-system-x86_64 -m 1G -object memory-backend-memfd,id=mem,size=1G,share=on \\
      -machine q35,memory-backend=mem -chardev socket,id=c,path=/run/vm1.sock \\
      -device vhost-user-blk-pci,chardev=c

  Streaming the layers below into the image, while the machine runs:
    stratactl --socket /run/vm1.qmp stream disk0 --speed 50M --wait

SIGTERM, SIGINT and SIGHUP end the program with all images closed clean. What does not end
within --stop-timeout is named and abandoned; a disk that had not answered for 10 seconds
before has an eighth of it.
Exit codes: 0 done, 1 failed, abandoned or wrong options.
"
    };
}

/// `--blockdev help`.
pub(super) const BLOCKDEV: &str = concat!(blockdev!(), "\n", notation!());
/// `--export help`.
pub(super) const EXPORT: &str = concat!(export!(), "\n", notation!());
/// `--chardev help` and `--monitor help`.
pub(super) const CHARDEV: &str = concat!(chardev!(), "\n", notation!());
/// `--object help`.
pub(super) const OBJECT: &str = concat!(
    "Types of objects: iothread\n\n",
    object!(),
    "\n",
    notation!()
);
/// `--trace help`.
pub(super) const TRACE: &str = concat!(trace!(), "\n", notation!());
/// What `--help` shows after the list of options.
pub(super) const DETAILS: &str = concat!(
    notation!(),
    "\n",
    blockdev!(),
    "\n",
    export!(),
    "\n",
    chardev!(),
    "\n",
    object!(),
    "\n",
    trace!(),
    "\n",
    examples!()
);
