//! What clients may send, and what the real qemu-storage-daemon answered to the same bytes.

use super::*;
use proptest::strategy::Strategy;
use serde_json::json;

fn decode(bytes: &[u8]) -> Vec<Result<Value, String>> {
    Decoder::new().push_all(bytes).into()
}

fn errors(bytes: &[u8]) -> Vec<String> {
    decode(bytes).into_iter().filter_map(Result::err).collect()
}

/// Would catch a decoder that needs a value to be in one packet, or packets to end with a value.
#[test]
fn any_split_gives_the_same_values() {
    let stream = br#"{"a":[1,-2.5e1,"x\"\u00e9\ud83d\ude00"]} 'it\'s' truefalse 7 {}[]{"#;
    let whole = decode(stream);
    assert_eq!(whole[0], Ok(json!({"a": [1, -25.0, "x\"\u{e9}\u{1f600}"]})));
    assert_eq!(whole[1], Ok(json!("it's")));
    assert_eq!(whole[3..], [Ok(json!(7)), Ok(json!({})), Ok(json!([]))]);
    for split in 1..stream.len() {
        let mut decoder = Decoder::new();
        let mut pieces = decoder.push_all(&stream[..split]);
        pieces.extend(decoder.push_all(&stream[split..]));
        assert_eq!(Vec::from(pieces), whole, "split at {split}");
    }
    let mut decoder = Decoder::new();
    let bytewise: Vec<_> = stream
        .iter()
        .flat_map(|&b| decoder.push_all(&[b]))
        .collect();
    assert_eq!(bytewise, whole);
}

/// Would catch texts, and numbers of answers, that differ from what clients know.
#[test]
fn broken_values_are_described_as_qemu_does() {
    let expecting = "JSON parse error, expecting value";
    for (bytes, wanted) in [
        (
            &b"{1:2}"[..],
            vec!["JSON parse error, key is not a string in object"],
        ),
        (
            b"{\"a\" 1}",
            vec!["JSON parse error, missing : in object pair"],
        ),
        (
            b"{\"a\"}",
            vec!["JSON parse error, missing : in object pair"],
        ),
        (
            b"{\"a\":1 \"b\":2}",
            vec!["JSON parse error, expected separator in dict"],
        ),
        (
            b"{\"a\":1,\"a\":2}",
            vec!["JSON parse error, duplicate key"],
        ),
        (
            b"[1 2]",
            vec!["JSON parse error, expected separator in list"],
        ),
        (b"[1,]", vec![expecting]),
        (b"{\"a\":1,}", vec![expecting]),
        (b"[1,}", vec![expecting]),
        (b"]]", vec![expecting, expecting]),
        (b"[tru]", vec!["JSON parse error, invalid keyword 'tru'"]),
        (
            b"[\"\\q\"]",
            vec!["JSON parse error, invalid escape sequence in string"],
        ),
        (
            b"[\"\\u12\"]",
            vec!["JSON parse error, \\u12\" is not a valid Unicode character"],
        ),
        (
            b"[\"\\ud83d\\u0041\"]",
            vec!["JSON parse error, \\ud83d is not a valid Unicode character"],
        ),
        (
            b"[\"\xed\xa0\x80\"]",
            vec!["JSON parse error, invalid UTF-8 sequence in string"],
        ),
        (
            b"[\"\xe2\x82\"]",
            vec!["JSON parse error, invalid UTF-8 sequence in string"],
        ),
        (b"[01]", vec!["JSON parse error, stray '01'", expecting]),
        (b"[1.]\n", vec!["JSON parse error, stray '1.]'"]),
        (b"[-]\n", vec!["JSON parse error, stray '-]'"]),
        (b"[TRUE]", vec!["JSON parse error, stray 'T'", expecting]),
        (
            b"[\"a\tb\"]\n",
            vec!["JSON parse error, stray '\"a\t'", expecting],
        ),
        (
            b"\x01\x02",
            vec![
                "JSON parse error, stray '\u{1}'",
                "JSON parse error, stray '\u{2}'",
            ],
        ),
        (
            b"{\"execute\":query-version}",
            vec!["JSON parse error, stray '-v'", expecting],
        ),
    ] {
        assert_eq!(
            errors(bytes),
            wanted,
            "for {:?}",
            String::from_utf8_lossy(bytes)
        );
    }
}

/// Would catch a decoder that stays lost after an error: the next value must come through.
#[test]
fn reading_goes_on_after_an_error() {
    for broken in [
        &b"{\"a\":@#$}\n"[..],
        b"\xff\xfe\n",
        b"\"abc\n",
        b"nul\n",
        b"{]",
        b"[1,}",
        b"\0",
    ] {
        let mut stream = broken.to_vec();
        stream.extend_from_slice(b"{\"execute\":\"x\"}");
        let found = decode(&stream);
        assert!(found[0].is_err(), "{:?}", String::from_utf8_lossy(broken));
        assert_eq!(found.last(), Some(&Ok(json!({"execute": "x"}))));
    }
}

/// Would catch unbounded recursion, and a limit that is off by one.
#[test]
fn nesting_is_limited() {
    let nested = |depth: usize| [vec![b'['; depth], vec![b']'; depth]].concat();
    assert!(decode(&nested(MAX_NESTING))[0].is_ok());
    let mut stream = nested(MAX_NESTING + 1);
    stream.extend_from_slice(b"{}");
    let found = decode(&stream);
    assert_eq!(
        found[0],
        Err("JSON nesting depth limit exceeded".to_owned())
    );
    assert_eq!(
        found[1..],
        [Ok(json!({}))],
        "one error, then the next value"
    );
    // Never closed: the line's end is where the damage ends.
    let found = decode(&[&[b'['; 100_000][..], b"\n{}"].concat());
    assert_eq!(found.len(), 2);
    assert_eq!(found[1], Ok(json!({})));
}

/// Would catch memory that grows with what a client sends, and a lost session afterwards.
#[test]
fn size_and_token_count_are_limited() {
    let mut decoder = Decoder::new();
    let mut found = decoder.push_all(b"{\"a\":\"");
    let block = vec![b'x'; 1 << 20];
    for _ in 0..66 {
        found.extend(decoder.push_all(&block));
    }
    assert_eq!(found, [Err("JSON token size limit exceeded".to_owned())]);
    assert_eq!(decoder.push_all(b"\"} {}"), [Ok(json!({}))]);

    let many = "1,".repeat(MAX_TOKENS / 2 + 1);
    let found = decode(&[b"[", many.as_bytes(), b"1] 5 "].concat());
    assert_eq!(
        found,
        [
            Err("JSON token count limit exceeded".to_owned()),
            Ok(json!(5))
        ]
    );
}

/// Would catch numbers that lose digits they had.
#[test]
fn numbers_keep_what_fits() {
    let text = b"[-9223372036854775808,18446744073709551615,99999999999999999999999,-0,1e999]";
    let Some(Ok(Value::Array(numbers))) = decode(text).into_iter().next() else {
        panic!("not a list");
    };
    assert_eq!(numbers[0], json!(i64::MIN));
    assert_eq!(numbers[1], json!(u64::MAX));
    assert_eq!(numbers[2], json!(1e23));
    assert_eq!(numbers[3], json!(0));
    assert_eq!(numbers[4], json!(f64::MAX));
}

proptest::proptest! {
    /// Would catch panics, and results that depend on where packets end, for whatever bytes come.
    #[test]
    fn any_bytes_in_any_packets(
        pieces in proptest::collection::vec(
            proptest::prop_oneof![
                proptest::sample::select(vec![
                    &b"{"[..], b"}", b"[", b"]", b":", b",", b"\"", b"'", b"\\", b"\\u", b"d83d",
                    b"\n", b" ", b"-", b"0", b"1", b".5", b"e", b"true", b"\"execute\"", b"\xe2",
                    b"\xff", b"\xc0", b"\x80", b"\0",
                ]).prop_map(<[u8]>::to_vec),
                proptest::collection::vec(proptest::prelude::any::<u8>(), 1..4),
            ],
            0..60,
        ),
    ) {
        let whole = decode(&pieces.concat());
        let mut decoder = Decoder::new();
        let split: Vec<_> = pieces.iter().flat_map(|piece| decoder.push_all(piece)).collect();
        proptest::prop_assert_eq!(whole, split);
    }
}

/// Would catch clients that hold more than their room together, room that is not given back, and a
/// command of the usual size that fails because of what others hold.
#[test]
fn unfinished_values_share_their_room() {
    const MIB: usize = 1 << 20;
    let pool = Pool::new(2 * MIB);
    let decoder = || Decoder::within(pool.clone());
    let (mut one, mut other) = (decoder(), decoder());
    let half = [b"{'execute': '".to_vec(), vec![b'x'; MIB]].concat();
    assert!(one.push_all(&half).is_empty());
    let left = pool.left();
    assert!(left < MIB, "{left}");
    let told = other.push_all(&half);
    assert_eq!(told.len(), 1, "one error for a value");
    assert!(matches!(&told[0], Err(text) if text.starts_with("Too much is held")));
    // What was thrown away takes no room, also not while its rest comes.
    assert!(other.push_all(&half).is_empty());
    assert_eq!(pool.left(), left);
    assert!(other.push_all(b"'}\n").is_empty());
    assert_eq!(other.push_all(b"{'id': 1}"), [Ok(json!({"id": 1}))]);
    // The first goes on as if nothing had been, and has made room when it is done.
    let whole = one.push_all(b"'}");
    assert_eq!(whole.len(), 1);
    assert_eq!(
        whole[0].as_ref().map(|value| value["execute"].is_string()),
        Ok(true)
    );
    assert_eq!(pool.left(), 2 * MIB);
    assert!(other.push_all(&half).is_empty());
    drop(other);
    assert_eq!(pool.left(), 2 * MIB);
}

/// Would catch many small tokens that take more room than their text, uncounted.
#[test]
fn tokens_take_room_as_well() {
    let pool = Pool::new(1 << 20);
    let mut decoder = Decoder::within(pool.clone());
    let list = [b"[".to_vec(), b"1,".repeat(200 << 10)].concat();
    let told = decoder.push_all(&list);
    assert!(
        told.iter()
            .any(|item| matches!(item, Err(text) if text.starts_with("Too much")))
    );
}
