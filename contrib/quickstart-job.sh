# What the quickstart's guest does. Runs in the guest; see contrib/guest.py
# for `report` and `hold`.

verify_files() {
    # From the disk, not from the page cache.
    sync
    echo 3 >/proc/sys/vm/drop_caches
    if (cd /mnt && md5sum -c MD5SUMS >/tmp/sums 2>&1); then
        report files "$1" "$(wc -l </mnt/MD5SUMS) good"
    else
        report files "$1" "BAD: $(grep -v ': OK$' /tmp/sums | head -n 3 | tr '\n' ' ')"
        return 1
    fi
}

# Random writes whose contents carry checksums, flushed now and then, and then
# all of it read again.
fio_verify() {
    if fio --name=quickstart --filename=/mnt/fio.dat --size=48M --rw=randwrite --bs=4k-64k \
        --direct=1 --ioengine=libaio --iodepth=16 --fsync=64 --verify=crc32c --do_verify=1 \
        --verify_fatal=1 --randseed=7 "$@" --output=/tmp/fio.out; then
        report fio "verified"
    else
        tail -n 20 /tmp/fio.out
        report fio "FAILED"
        return 1
    fi
}

mount -t ext4 /dev/vda /mnt || return 1
report mounted "$(df -m /mnt | tail -n 1 | awk '{print $3 " MB used of " $2}')"
verify_files before || return 1
report working
fio_verify || return 1
# The stream runs, or has just ended: both must look alike.
verify_files again || return 1
hold end-of-stream
verify_files after || return 1
fio_verify --verify_only=1 || return 1
umount /mnt
