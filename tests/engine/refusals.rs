//! What is refused, in which words, and that nothing was written before.
//!
//! What would be caught: encrypted images taken for plain ones, unknown features ignored,
//! autoclear bits cleared in an image that is then refused, chains that loop.

use std::os::unix::fs::FileExt;
use std::path::Path;

use serde_json::json;

use crate::support::*;

/// Opens `path` for writing, which must fail with `expected` in its text and leave it as it was.
fn refused(path: &Path, expected: &str) {
    let before = std::fs::read(path).unwrap();
    let error = Disk::try_open(path, "qcow2", json!({})).err();
    let text = error.map(|error| error.to_string()).unwrap_or_default();
    assert!(text.contains(expected), "expected '{expected}' in '{text}'");
    assert!(
        before == std::fs::read(path).unwrap(),
        "a refused image was changed"
    );
}

fn patch(path: &Path, offset: u64, bytes: &[u8]) {
    let file = std::fs::File::options().write(true).open(path).unwrap();
    file.write_all_at(bytes, offset).unwrap();
}

#[test]
fn encryption_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = in_dir(&dir, "luks.qcow2");
    let options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10";
    run(
        "qemu-img",
        &[
            "create",
            "-q",
            "--object",
            "secret,id=s,data=geheim",
            "-f",
            "qcow2",
            "-o",
            options,
        ]
        .into_iter()
        .chain([path.to_str().unwrap(), "1M"])
        .collect::<Vec<_>>(),
    );
    refused(&path, "LUKS");
}

#[test]
fn unsupported_features_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = in_dir(&dir, "image.qcow2");
    create(&path, "compat=1.1", 1 << 20);
    // An autoclear bit that must not be cleared, and a bit nobody knows.
    patch(&path, 88, &1u64.to_be_bytes());
    patch(&path, 72, &(1u64 << 40).to_be_bytes());
    refused(&path, "bit 40");
}

#[test]
fn images_that_must_not_be_written_open_read_only() {
    let dir = tempfile::tempdir().unwrap();
    let path = in_dir(&dir, "image.qcow2");
    create(&path, "compat=1.1", 1 << 20);
    patch(&path, 72, &2u64.to_be_bytes());
    refused(&path, "stratactl image check --repair all");
}

/// Writes another backing file into the header, whether or not it exists.
fn rebase(path: &Path, format: &str, backing: &str) {
    let image = path.to_str().unwrap();
    let args = [
        "rebase", "-u", "-f", "qcow2", "-F", format, "-b", backing, image,
    ];
    run("qemu-img", &args);
}

#[test]
fn chains_that_loop_or_lead_nowhere_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (in_dir(&dir, "a.qcow2"), in_dir(&dir, "b.qcow2"));
    create(&a, "compat=1.1", 1 << 20);
    create_over(&b, "", &a, "qcow2");
    rebase(&a, "qcow2", "b.qcow2");
    refused(&b, "loop");
    rebase(&a, "raw", "nbd://localhost/x");
    refused(&a, "names a remote backing file");
    rebase(&a, "raw", "missing.raw");
    refused(&a, "No such file or directory");
}

#[test]
fn names_are_resolved_from_the_overlays_folder() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("sub")).unwrap();
    let base = dir.path().join("sub/base.raw");
    std::fs::write(&base, vec![9; 1 << 20]).unwrap();
    let top = dir.path().join("top.qcow2");
    create_over(&top, "", &base, "raw");
    for name in [
        "sub/base.raw".to_owned(),
        "file:sub/base.raw".to_owned(),
        format!(
            "json:{{\"driver\":\"raw\",\"file\":{{\"driver\":\"file\",\"filename\":\"{}\"}}}}",
            base.display()
        ),
    ] {
        rebase(&top, "raw", &name);
        let disk = Disk::open(&top, "qcow2", json!({}));
        assert_eq!(disk.read(4096, 512), vec![9; 512], "{name}");
        disk.close();
    }
}
