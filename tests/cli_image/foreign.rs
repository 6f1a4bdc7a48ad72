//! The tools and containers of other programs. What would be caught: a tool that takes one for a
//! raw disk and copies its bytes, cuts it off or calls it raw.

use super::tools::{Dir, errors};

/// What is made, by its options, and the name that it has for QEMU.
const CONTAINERS: &[(&str, &str, &str)] = &[
    ("VMDK", "vmdk", "subformat=monolithicSparse"),
    ("VMDK", "vmdk", "subformat=monolithicFlat"),
    ("VHD", "vpc", "subformat=dynamic"),
    ("VHD", "vpc", "subformat=fixed"),
    ("VHDX", "vhdx", "subformat=dynamic"),
    ("VDI", "vdi", "static=off"),
    ("LUKS", "luks", ""),
];

/// Makes the extension with the backing file's format one that nobody knows: QEMU writes no image
/// without it any longer, but there are old ones.
fn forget_format(dir: &Dir, file: &str) {
    let mut bytes = std::fs::read(dir.path(file)).unwrap();
    let magic = [0xe2, 0x79, 0x2a, 0xca];
    let at = bytes.windows(4).position(|window| window == magic).unwrap();
    bytes[at..at + 4].fill(0x51);
    std::fs::write(dir.path(file), bytes).unwrap();
}

#[test]
fn tools_refuse_what_they_do_not_understand() {
    for (name, format, options) in CONTAINERS {
        println!("{name}, {options}");
        let dir = Dir::new();
        if *format == "luks" {
            // QEMU takes seconds for the key of one.
            let mut bytes = b"LUKS\xba\xbe\0\x01aes\0".to_vec();
            bytes.resize(4 << 20, 0);
            std::fs::write(dir.path("alien"), bytes).unwrap();
        } else {
            let args = ["create", "-q", "-f", format, "-o", options, "alien", "4M"];
            dir.qemu(&args);
        }
        dir.qemu(&["create", "-q", "-f", "raw", "disk", "4M"]);
        dir.qemu(&["create", "-q", "-f", "qcow2", "image", "4M"]);
        // An overlay that does not say what its backing file is.
        let args = [
            "create", "-q", "-f", "qcow2", "-u", "-b", "alien", "-F", "raw",
        ];
        dir.qemu(&[&args[..], &["overlay", "4M"]].concat());
        forget_format(&dir, "overlay");
        let files = ["alien", "overlay", "image"];
        let read = || files.map(|file| std::fs::read(dir.path(file)).unwrap());
        let before = read();
        for args in [
            &["map", "alien"][..],
            &["map", "overlay"],
            &["compare", "alien", "disk"],
            &["compare", "disk", "alien"],
            &["compare", "overlay", "disk"],
            &["resize", "alien", "8M"],
            &["resize", "--shrink", "alien", "1M"],
            &["resize", "overlay", "8M"],
            &["rebase", "overlay"],
            &["rebase", "-b", "disk", "-F", "raw", "overlay"],
            &["rebase", "-b", "disk", "-F", "raw", "alien"],
            &["rebase", "-u", "-b", "disk", "-F", "raw", "alien"],
            &["rebase", "-b", "alien", "image"],
            &["set-backing", "alien", "disk", "-F", "raw"],
            &["create", "-f", "qcow2", "-b", "alien", "new"],
            &["snapshot", "-l", "alien"],
            &["check", "alien"],
            &["check", "-r", "all", "alien"],
        ] {
            let output = dir.image(args);
            let said = errors(&output);
            assert!(!output.status.success(), "{args:?} succeeded");
            let named = said.contains(&format!("a {name} image"));
            assert!(named || said.contains("must be named"), "{args:?}: {said}");
            assert!(read() == before, "{args:?} changed a file");
        }
        assert!(!dir.path("new").exists());
        // It is told what it is.
        let told = dir.ctl_json(&["info", "alien"]);
        assert_eq!(told["format"], *format);
        assert!(told.get("virtual-size").is_none());
        assert!(
            dir.ctl(&["info", "alien"])
                .contains("virtual size: unknown")
        );
        let chain = dir.ctl_json(&["info", "--backing-chain", "overlay"]);
        assert_eq!(chain[1]["format"], *format, "{chain}");
        // The user may mean the bytes.
        dir.ctl(&["map", "-f", "raw", "alien"]);
        dir.ctl(&["compare", "-f", "raw", "-F", "raw", "alien", "alien"]);
        assert_eq!(
            dir.ctl_json(&["info", "-f", "raw", "alien"])["format"],
            "raw"
        );
        dir.ctl(&["create", "-f", "qcow2", "-b", "alien", "-F", "raw", "new"]);
        let output = dir.image(&["map", "-f", format, "alien"]);
        assert!(
            errors(&output).contains("Unknown driver"),
            "{}",
            errors(&output)
        );
    }
}

/// A header that leads elsewhere.
#[test]
fn tools_follow_no_header_to_another_host() {
    let dir = Dir::new();
    dir.qemu(&["create", "-q", "-f", "raw", "disk", "4M"]);
    let nbd = r#"json:{"driver":"raw","file":{"driver":"nbd","path":"/nothing"}}"#;
    for name in ["nbd://localhost:1/x", "http://localhost:1/x", nbd] {
        dir.qemu(&["create", "-q", "-f", "qcow2", "image", "4M"]);
        dir.qemu(&[
            "rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", name, "image",
        ]);
        let before = std::fs::read(dir.path("image")).unwrap();
        for args in [
            &["map", "image"][..],
            &["compare", "image", "disk"],
            &["resize", "image", "8M"],
            &["rebase", "image"],
            &["info", "--backing-chain", "image"],
            &["create", "-f", "qcow2", "-b", name, "-F", "raw", "new"],
        ] {
            let output = dir.image(args);
            let said = errors(&output);
            assert!(!output.status.success(), "{args:?} succeeded");
            assert!(said.contains("remote"), "{args:?}: {said}");
            assert!(std::fs::read(dir.path("image")).unwrap() == before);
        }
        assert!(!dir.path("new").exists());
        // What it names can be seen, and taken out.
        assert_eq!(dir.ctl_json(&["info", "image"])["backing-filename"], name);
        dir.ctl(&["set-backing", "image", ""]);
    }
}
