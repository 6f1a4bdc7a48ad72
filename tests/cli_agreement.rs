//! The command line beside others: the real qemu-storage-daemon, and our documentation.

#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

use std::process::Command;
use stratablk::config::{Action, parse};

fn help(args: &[&str]) -> String {
    match parse(std::iter::once("stratablk").chain(args.iter().copied())) {
        Ok(Action::Help(text)) => text,
        other => panic!("{args:?}: {other:?}"),
    }
}

/// Would catch a line that we read where the real program refuses it, or the other way round.
#[test]
fn the_real_program_agrees() {
    if Command::new("qemu-storage-daemon")
        .arg("-V")
        .output()
        .is_err()
    {
        eprintln!("SKIPPED: qemu-storage-daemon is not installed (Debian: qemu-utils)");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("raw"), vec![0; 1 << 20]).unwrap();
    let file = "file,node-name=n,filename=raw";
    let export = "vhost-user-blk,id=e,node-name=n,addr.type=unix,addr.path=s";
    let blockdevs = [
        file,
        "driver=file,node-name=n,filename=raw,",
        "node-name=n,driver=file,filename=no,filename=raw",
        "node-name=n,file,filename=raw",
        "file,node-name=n,filename=raw,,x",
        "file,node-name=n,filename=raw,read-only=yes",
        "file,node-name=n,filename=raw,read-only=maybe",
        "file,node-name=n,filename=raw,read-only",
        "file,node-name=n,filename=raw,cache.direct=off,cache.no-flush=on",
        "file,node-name=n,filename=raw,cache=none",
        "file,node-name=n,filename=raw,cache.writeback=on",
        "file,node-name=n,filename=raw,locking=off,aio=threads",
        "file,node-name=n,filename=raw,aio=fast",
        "file,node-name=n,filename=raw,force-share=on",
        "file,node-name=n,filename=raw,force-share=on,read-only=on",
        "file,node-name=n,filename=raw,detect-zeroes=unmap",
        "file,node-name=n,filename=raw,detect-zeroes=unmap,discard=unmap",
        "file,node-name=1,filename=raw",
        "file,node-name=n23456789012345678901234567890123,filename=raw",
        "file,node-name=n2345678901234567890123456789012,filename=raw",
        "file,node-name=n,filename=raw,x..y=1",
        "file,node-name=n,filename=raw,=1",
        "file,node-name=n",
        "file,filename=raw",
        "nonsense,node-name=n",
        "raw,node-name=n,file.driver=file,file.filename=raw,offset=512,size=0x200",
        "raw,node-name=n,file.driver=file,file.filename=raw,file=x",
        "raw,node-name=n,file.driver=file,file.filename=raw,file.0=x",
        "raw,node-name=n,file=none",
        "raw,node-name=n,size=1x,file.driver=file,file.filename=raw",
        r#"{"driver":"file","node-name":"n","filename":"raw","read-only":true}"#,
        r#"{"driver":"file","node-name":"n","filename":"raw","read-only":"on"}"#,
        r#"{"driver":"file","node-name":"n","filename":"raw",}"#,
        r#"{"driver":"file","node-name":"n","filename":1}"#,
    ];
    let mut lines: Vec<Vec<String>> = blockdevs
        .iter()
        .map(|text| vec!["--blockdev".into(), (*text).into()])
        .collect();
    for more in [
        "",
        ",writable=on,num-queues=2,logical-block-size=4096",
        ",num-queues=0",
        ",num-queues=65536",
        ",logical-block-size=1000",
        ",writable=perhaps",
        ",iothread=none",
        ",addr.type=inet",
        ",addr.str=3",
        ",id=1",
        ",name=x",
        ",id=f,id=g",
    ] {
        let export = format!("{export}{more}");
        lines.push(
            ["--blockdev", file, "--export", &export]
                .map(String::from)
                .into(),
        );
    }
    for (option, text) in [
        ("--object", "iothread,id=i,poll-max-ns=1"),
        ("--object", "iothread"),
        ("--object", "iothread,id=1"),
        ("--object", "iothread,id=i,x=1"),
        ("--chardev", "socket,id=c,path=q,server=on,wait=off"),
        ("--chardev", "socket,path=q"),
        ("--chardev", "socket,id=c,path=q,server,nowait"),
        ("--chardev", "socket,id=c"),
        ("--chardev", "socket,id=c,path=q,server=on,wait=off,x=1"),
        ("--monitor", "nobody"),
        ("--monitor", "nobody,x=1"),
        ("--trace", "enable=job_*"),
    ] {
        lines.push(vec![option.to_owned(), text.to_owned()]);
    }
    for line in lines {
        // Asking for help at last makes it end after all before has been done.
        let output = Command::new("qemu-storage-daemon")
            .args(&line)
            .args(["--object", "help"])
            .current_dir(dir.path())
            .output()
            .unwrap();
        let theirs = output.status.success();
        let ours = parse(std::iter::once("stratablk").chain(line.iter().map(String::as_str)));
        let said = String::from_utf8_lossy(&output.stderr);
        // Files are opened later here: what is not there is no mistake of the line.
        let later = said.contains("Could not open");
        assert!(
            ours.is_ok() == theirs || later,
            "{line:?}: theirs: {said}; ours: {ours:?}"
        );
    }
}

/// Would catch an option that the documentation forgot.
#[test]
fn the_documentation_names_every_option() {
    let page = include_str!("../docs/command-line.md");
    let short = help(&["-h"]);
    let options = short
        .split_whitespace()
        .filter(|word| word.starts_with("--"));
    let mut count = 0;
    for word in options {
        let end = word
            .find(|c: char| !c.is_ascii_lowercase() && c != '-')
            .unwrap_or(word.len());
        let option = &word[..end];
        assert!(
            page.contains(option),
            "docs/command-line.md does not name {option}"
        );
        count += 1;
    }
    assert!(count > 20, "the options were not found in the help");
}
