//! A training run as a TensorBoard event file: scalars by step. Knows the two formats that takes, a TFRecord's frame
//! and the few fields of the `Event` message; nothing of training. Every event has its step for a time, so that the
//! same run gives the same bytes.
//!
//! ```text
//! record   length u64 | masked crc32c of the length | data | masked crc32c of the data      little-endian
//! Event    1 wall_time f64 | 2 step varint | 3 file_version string | 5 summary { 1 value { 1 tag, 2 simple_value f32 } }
//! ```

use super::protobuf::{CASTAGNOLI, Message, crc32};

/// One value of a curve.
pub(super) struct Scalar {
    pub(super) tag: &'static str,
    pub(super) step: usize,
    pub(super) value: f64,
}

/// The bytes of an event file.
pub(super) fn event_file(scalars: &[Scalar]) -> Vec<u8> {
    let mut file = Vec::new();
    let mut first = Message::default();
    first.fixed64(1, 0.0);
    first.bytes(3, b"brain.Event:2");
    record(&mut file, &first.0);
    for scalar in scalars {
        let (mut value, mut summary, mut event) =
            (Message::default(), Message::default(), Message::default());
        value.bytes(1, scalar.tag.as_bytes());
        value.fixed32(2, scalar.value as f32);
        summary.bytes(1, &value.0);
        event.fixed64(1, scalar.step as f64);
        event.varint(2, scalar.step as u64);
        event.bytes(5, &summary.0);
        record(&mut file, &event.0);
    }
    file
}

fn record(file: &mut Vec<u8>, data: &[u8]) {
    let length = (data.len() as u64).to_le_bytes();
    file.extend(length);
    file.extend(masked_crc32c(&length).to_le_bytes());
    file.extend(data);
    file.extend(masked_crc32c(data).to_le_bytes());
}

/// TFRecord's checksum: CRC-32C, turned and shifted so that a checksum of data with checksums stays one.
fn masked_crc32c(data: &[u8]) -> u32 {
    crc32(CASTAGNOLI, data.iter().copied()).rotate_right(15).wrapping_add(0xA282_EAD8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn event_file_is_the_one_tensorboard_reads() {
        // Read back with tensorboard 2.21's EventAccumulator: see tests/golden/tensorboard_check.py.
        let scalar = |tag, step, value| Scalar { tag, step, value };
        let scalars =
            [scalar("train/loss", 1, 2.5), scalar("train/loss", 300, 0.125), scalar("eval/loss", 300, 1.0)];
        let golden = std::path::Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/golden/events.out.tfevents.0.tunesmith");
        assert_eq!(event_file(&scalars), fs_err::read(golden).unwrap());
    }
}
