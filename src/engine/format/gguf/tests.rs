//! GGUF files whole, cut short and hostile. Broken files are made by changing bytes of sound ones.

use super::header::Header;
use super::*;
use crate::format::gguf_writer::{GgufWriter, Q4_1, tiny_llama};

fn parse(bytes: &[u8]) -> Result<Header, GgufError> {
    Header::parse(bytes)
}

#[test]
fn every_metadata_type_is_read() {
    let mut bytes = b"GGUF".to_vec();
    bytes.extend(2u32.to_le_bytes());
    bytes.extend(0u64.to_le_bytes());
    let values: [(u32, &[u8], Value); 13] = [
        (0, &[200], Value::Unsigned(200)),
        (1, &[200], Value::Signed(-56)),
        (2, &[1, 2], Value::Unsigned(513)),
        (3, &[255, 255], Value::Signed(-1)),
        (4, &[0, 0, 0, 128], Value::Unsigned(1 << 31)),
        (5, &[255; 4], Value::Signed(-1)),
        (6, &[0, 0, 192, 63], Value::Float(1.5)),
        (7, &[1], Value::Bool(true)),
        (8, &[2, 0, 0, 0, 0, 0, 0, 0, b'h', b'i'], Value::Text("hi".to_owned())),
        (
            9,
            &[0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 7, 8],
            Value::List(vec![Value::Unsigned(7), Value::Unsigned(8)]),
        ),
        (10, &[255; 8], Value::Unsigned(u64::MAX)),
        (11, &[255; 8], Value::Signed(-1)),
        (12, &[0, 0, 0, 0, 0, 0, 248, 63], Value::Float(1.5)),
    ];
    bytes.extend((values.len() as u64).to_le_bytes());
    for (code, encoded, _) in &values {
        let key = format!("k{code}");
        bytes.extend((key.len() as u64).to_le_bytes());
        bytes.extend(key.as_bytes());
        bytes.extend(code.to_le_bytes());
        bytes.extend(*encoded);
    }
    let header = parse(&bytes).unwrap();
    for (code, _, expected) in values {
        assert_eq!(header.metadata[&format!("k{code}")], expected);
    }
}

#[test]
fn a_file_cut_short_anywhere_is_an_error() {
    let whole = tiny_llama(Q4_1).finish();
    assert!(parse(&whole).is_ok());
    for eighth in 0..8 {
        let cut = &whole[..whole.len() * eighth / 8];
        let error = parse(cut).unwrap_err().to_string();
        assert!(error.contains("cut short"), "{eighth}/8: {error}");
    }
    // Byte by byte through the header's start, and off the end of the last tensor.
    for len in (0..400).chain(whole.len() - 40..whole.len()) {
        assert!(parse(&whole[..len]).is_err(), "{len}");
    }
}

#[test]
fn any_byte_changed_is_an_error_or_another_file_but_no_panic() {
    let whole = tiny_llama(Q4_1).finish();
    let header = whole.len().min(12_000);
    for at in (0..header).step_by(7) {
        for value in [0, 0x7f, 0xff] {
            let mut changed = whole.clone();
            changed[at] = value;
            let _ = parse(&changed);
        }
    }
}

fn hostile(change: impl Fn(&mut Vec<u8>)) -> String {
    let mut file = GgufWriter::default();
    file.text("k", "v").floats("t", &[2, 2], &[0.0; 4]);
    let mut bytes = file.finish();
    change(&mut bytes);
    parse(&bytes).unwrap_err().to_string()
}

#[track_caller]
fn check(change: impl Fn(&mut Vec<u8>), expected: &str) {
    let error = hostile(change);
    assert!(error.contains(expected), "{error}");
}

#[test]
fn hostile_headers_are_refused_with_the_culprit() {
    let put = |bytes: &mut Vec<u8>, at: usize, value: u64| {
        bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
    };
    // 0 magic, 4 version, 8 tensors, 16 entries, 24 key length, 32 "k", 33 type, 37 length, 45 "v",
    // 46 name length, 54 "t", 55 dimensions, 59 and 67 sizes, 75 type, 79 offset.
    check(|bytes| bytes[0] = b'X', "does not start with `GGUF`");
    check(|bytes| bytes[4] = 1, "version 1 is not supported");
    check(|bytes| bytes[4..8].copy_from_slice(&3u32.to_be_bytes()), "little-endian");
    check(|bytes| put(bytes, 8, u64::MAX), "number of tensors");
    check(|bytes| put(bytes, 16, 1 << 40), "number of metadata entries");
    check(|bytes| put(bytes, 24, u64::MAX), "length of a metadata key");
    check(|bytes| put(bytes, 37, 1 << 20), "ends within k");
    check(|bytes| bytes[45] = 0xff, "not UTF-8");
    check(|bytes| bytes[33] = 13, "unknown type 13");
    check(|bytes| bytes[55] = 9, "tensor `t`: 9 dimensions");
    check(|bytes| bytes[55] = 0, "tensor `t`: 0 dimensions");
    check(|bytes| put(bytes, 59, 0), "tensor `t`: rows of 0 values");
    check(|bytes| put(bytes, 67, 0), "tensor `t`: the shape [0, 2] is impossible");
    check(|bytes| put(bytes, 67, 1 << 62), "tensor `t`: the shape");
    check(|bytes| put(bytes, 67, 1 << 40), "tensor `t`: needs");
    check(|bytes| put(bytes, 79, u64::MAX - 31), "tensor `t`: needs 16 bytes");
    check(|bytes| put(bytes, 79, 1), "no multiple of the alignment");
    check(|bytes| bytes[75] = 200, "200 (unknown)");
    check(|bytes| bytes[75] = 14, "no whole number of blocks of 256");
    check(|bytes| bytes[75] = 19, "the type IQ1_S, which is not supported; supported: F32");
}

#[test]
fn hostile_arrays_are_refused_before_they_are_allocated() {
    let with = |value: Value| {
        let mut file = GgufWriter::default();
        file.set("list", value);
        file.finish()
    };
    let mut bytes = with(Value::List(vec![Value::Bool(true)]));
    let count = bytes.len() - 9;
    bytes[count..count + 8].copy_from_slice(&(1u64 << 50).to_le_bytes());
    assert!(parse(&bytes).unwrap_err().to_string().contains("number of array values up to `list`"));
    let mut bytes = with(Value::List(vec![Value::Text("x".to_owned()); 4]));
    let count = bytes.len() - 4 * 9 - 8;
    bytes[count..count + 8].copy_from_slice(&1000u64.to_le_bytes());
    assert!(parse(&bytes).unwrap_err().to_string().contains("ends within list: 8000 bytes needed"));
    let nested = with(Value::List(vec![Value::List(Vec::new())]));
    assert!(parse(&nested).unwrap_err().to_string().contains("array within array `list`"));
}

#[test]
fn tensors_that_share_bytes_are_refused() {
    let mut file = GgufWriter::default();
    file.floats("a", &[12], &[0.0; 12]).floats("b", &[4], &[0.0; 4]);
    let mut bytes = file.finish();
    // `b` is the last entry; its offset is the last field before the padding to the data.
    let name = bytes.iter().rposition(|&byte| byte == b'b').unwrap();
    let offset = name + 1 + 4 + 8 + 4;
    assert_eq!(bytes[offset..offset + 8], 64u64.to_le_bytes());
    bytes[offset..offset + 8].copy_from_slice(&32u64.to_le_bytes());
    let error = parse(&bytes).unwrap_err().to_string();
    assert!(error.contains("tensors `a` and `b` overlap"), "{error}");
}

#[test]
fn names_that_appear_twice_are_refused() {
    let mut file = GgufWriter::default();
    file.text("a", "1").text("b", "2");
    let mut bytes = file.finish();
    let at = bytes.iter().rposition(|&byte| byte == b'b').unwrap();
    bytes[at] = b'a';
    assert_eq!(parse(&bytes), Err(GgufError::Duplicate { name: "a".to_owned() }));
}
