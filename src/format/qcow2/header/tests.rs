//! What would be caught: a header of which too little is read, so that an extension or the
//! backing file's name is missed, or an error is told that the whole cluster would not give.

use proptest::prelude::*;

use super::*;

const CLUSTER: usize = 1 << 16;
const START: usize = 4096;

/// The first cluster of an image with these extensions, and a backing file name.
fn cluster(extensions: &[(u32, Vec<u8>)], end: bool, name: Option<(usize, usize)>) -> Vec<u8> {
    let mut raw = vec![0xa5; CLUSTER];
    raw[..V3_LENGTH].fill(0);
    let mut put = |at: usize, bytes: &[u8]| {
        let room = raw.len().saturating_sub(at).min(bytes.len());
        if room > 0 {
            raw[at..at + room].copy_from_slice(&bytes[..room]);
        }
    };
    put(0, &MAGIC.to_be_bytes());
    put(4, &3u32.to_be_bytes());
    put(20, &16u32.to_be_bytes());
    put(24, &(1u64 << 20).to_be_bytes());
    put(36, &1u32.to_be_bytes());
    put(40, &(3u64 << 16).to_be_bytes());
    put(48, &(1u64 << 16).to_be_bytes());
    put(56, &1u32.to_be_bytes());
    put(96, &4u32.to_be_bytes());
    put(100, &(V3_LENGTH as u32).to_be_bytes());
    let mut at = V3_LENGTH;
    for (kind, data) in extensions {
        put(at, &kind.to_be_bytes());
        put(at + 4, &(data.len() as u32).to_be_bytes());
        put(at + 8, data);
        at += 8 + data.len().next_multiple_of(8);
    }
    if end {
        put(at, &[0; 8]);
    }
    if let Some((place, len)) = name {
        put(8, &(place as u64).to_be_bytes());
        put(16, &(len as u32).to_be_bytes());
        put(place, &vec![b'n'; len]);
    }
    raw
}

/// All that was found, without the bytes that it was found in.
fn found(raw: &[u8]) -> std::result::Result<Header, String> {
    let header = Header::describe(raw.to_vec(), "image").map_err(|error| error.to_string())?;
    Ok(Header {
        raw: Vec::new(),
        ..header
    })
}

proptest! {
    #[test]
    fn the_start_says_what_the_cluster_does(
        extensions in proptest::collection::vec(
            (1u32..6, proptest::collection::vec(any::<u8>(), 0..1800)), 0..4),
        end in proptest::bool::weighted(0.8),
        name in proptest::option::of((104usize..5000, 0usize..1200)),
    ) {
        let raw = cluster(&extensions, end, name);
        let start = &raw[..START];
        if is_whole(start) {
            prop_assert_eq!(format!("{:?}", found(start)), format!("{:?}", found(&raw)));
        }
    }
}

#[test]
fn usual_headers_are_in_their_first_bytes() {
    let raw = cluster(
        &[(EXT_FEATURE_NAMES, vec![0; 384])],
        true,
        Some((512, 1023)),
    );
    assert!(is_whole(&raw[..START]));
}

#[test]
fn what_lies_behind_is_read() {
    let long = (EXT_FEATURE_NAMES, vec![0; 3984]);
    assert!(!is_whole(&cluster(&[long], true, None)[..START]));
    assert!(!is_whole(
        &cluster(&[], true, Some((START - 10, 11)))[..START]
    ));
    assert!(is_whole(
        &cluster(&[], true, Some((START - 10, 10)))[..START]
    ));
}
