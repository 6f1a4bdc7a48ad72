//! `compare`. What would be caught: a difference that is not seen, or one seen where there is
//! none; another exit code than `qemu-img` has.

use super::tools::{Dir, errors, rng};
use rand::Rng;

/// Both tools on the same images; returns the exit code.
fn agree(dir: &Dir, args: &[&str]) -> i32 {
    let args = [&["compare"], args].concat();
    let (ours, theirs) = (dir.image(&args), dir.qemu_img(&args));
    assert_eq!(
        ours.status.code(),
        theirs.status.code(),
        "{args:?}: {}",
        errors(&ours)
    );
    // QEMU adds a warning about sizes, and names the sector of a difference.
    let last = |bytes: &[u8]| {
        let text = String::from_utf8_lossy(bytes).into_owned();
        let words: Vec<String> = text
            .lines()
            .last()
            .unwrap_or("")
            .split(' ')
            .map(sector)
            .collect();
        words.join(" ")
    };
    assert_eq!(last(&ours.stdout), last(&theirs.stdout), "{args:?}");
    ours.status.code().unwrap()
}

fn sector(word: &str) -> String {
    match word.trim_end_matches('!').parse::<u64>() {
        Ok(number) => (number / 512 * 512).to_string(),
        Err(_) => word.to_owned(),
    }
}

#[test]
fn differences_are_found() {
    let mut rng = rng();
    let dir = Dir::new();
    dir.qemu(&["create", "-q", "-f", "raw", "a.raw", "5M"]);
    dir.scribble("raw", "a.raw", 5 << 20, &mut rng);
    for options in ["compat=1.1", "cluster_size=512", "extended_l2=on"] {
        dir.qemu(&[
            "convert", "-f", "raw", "-O", "qcow2", "-o", options, "a.raw", "b",
        ]);
        assert_eq!(agree(&dir, &["-f", "raw", "-F", "qcow2", "a.raw", "b"]), 0);
        let mut bytes = std::fs::read(dir.path("a.raw")).unwrap();
        bytes[rng.random_range(0..5 << 20)] ^= 1;
        std::fs::write(dir.path("c.raw"), &bytes).unwrap();
        assert_eq!(agree(&dir, &["-f", "raw", "-F", "qcow2", "c.raw", "b"]), 1);
        assert_eq!(agree(&dir, &["-f", "qcow2", "-F", "raw", "b", "c.raw"]), 1);
    }
}

#[test]
fn sizes_count_where_there_is_data_or_when_strict() {
    let dir = Dir::new();
    dir.qemu(&["create", "-q", "-f", "qcow2", "small", "1M"]);
    dir.qemu(&["create", "-q", "-f", "qcow2", "large", "2M"]);
    assert_eq!(agree(&dir, &["small", "large"]), 0);
    assert_eq!(agree(&dir, &["-s", "small", "large"]), 1);
    dir.io("qcow2", "large", &["write -q -P 1 1500k 1k".to_owned()]);
    assert_eq!(agree(&dir, &["small", "large"]), 1);
    assert_eq!(agree(&dir, &["large", "small"]), 1);
    // The same contents, allocated in one of them.
    dir.qemu(&["create", "-q", "-f", "qcow2", "zeros", "1M"]);
    dir.io("qcow2", "zeros", &["write -q -z 64k 64k".to_owned()]);
    assert_eq!(agree(&dir, &["small", "zeros"]), 0);
    // QEMU's offset is where its own run begins; ours is where they differ.
    let output = dir.image(&["compare", "-s", "small", "zeros"]);
    let theirs = dir.qemu_img(&["compare", "-s", "small", "zeros"]);
    assert_eq!(output.status.code(), theirs.status.code());
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(text, "Strict mode: Offset 65536 block status mismatch!\n");
    assert_eq!(agree(&dir, &["-s", "zeros", "zeros"]), 0);
}

#[test]
fn what_cannot_be_read_is_no_difference() {
    let dir = Dir::new();
    dir.qemu(&["create", "-q", "-f", "raw", "a.raw", "1M"]);
    let output = dir.image(&["compare", "a.raw", "missing"]);
    assert_eq!(output.status.code(), Some(2), "{}", errors(&output));
    let told = dir.ctl_json(&["compare", "a.raw", "a.raw"]);
    assert_eq!(told["identical"], true);
}

/// What would be caught: a cluster whose place is kept for zeros taken for one that has none, or for one
/// that holds data, in any pair of ways to be all zeros.
#[test]
fn strict_comparison_sees_what_is_kept() {
    let dir = Dir::new();
    let make = |name: &str, options: &str, writes: &[&str]| {
        let create = ["create", "-q", "-f", "qcow2", "-o", options, name, "256k"];
        dir.qemu(&create);
        let writes: Vec<String> = writes.iter().map(|write| (*write).to_owned()).collect();
        dir.io("qcow2", name, &writes);
    };
    make("none", "compat=1.1", &["flush"]);
    make("ahead", "preallocation=metadata", &["flush"]);
    make("zeros", "compat=1.1", &["write -q -z 0 256k"]);
    make(
        "kept",
        "compat=1.1",
        &["write -q -P 1 0 256k", "write -q -z 0 256k"],
    );
    make("data", "compat=1.1", &["write -q -P 0 0 256k"]);
    make("compressed", "compat=1.1", &["write -q -c -P 0 0 256k"]);
    make("parts", "extended_l2=on", &["write -q -P 0 0 256k"]);
    make(
        "kept-parts",
        "extended_l2=on",
        &["write -q -P 1 0 256k", "write -q -z 0 256k"],
    );
    dir.qemu(&["create", "-q", "-f", "raw", "hole", "256k"]);
    let all = [
        "none",
        "ahead",
        "zeros",
        "kept",
        "data",
        "compressed",
        "parts",
        "kept-parts",
        "hole",
    ];
    let mut differ = 0;
    for a in all {
        for b in all {
            let format = |name| if name == "hole" { "raw" } else { "qcow2" };
            let args = ["compare", "-s", "-f", format(a), "-F", format(b), a, b];
            let (ours, theirs) = (dir.image(&args), dir.qemu_img(&args));
            let (ours, theirs) = (ours.status.code(), theirs.status.code());
            assert_eq!(ours, theirs, "{a} and {b}");
            differ |= 1 << ours.unwrap();
        }
    }
    assert_eq!(differ, 1 | 1 << 1, "all were the same, or none");
}
