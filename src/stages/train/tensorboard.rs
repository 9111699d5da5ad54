//! A training run as a TensorBoard event file: scalars by step. Knows the two formats that takes, a TFRecord's frame
//! and the few fields of the `Event` message; nothing of training. Every event has its step for a time, so that the
//! same run gives the same bytes.
//!
//! ```text
//! record   length u64 | masked crc32c of the length | data | masked crc32c of the data      little-endian
//! Event    1 wall_time f64 | 2 step varint | 3 file_version string | 5 summary { 1 value { 1 tag, 2 simple_value f32 } }
//! ```

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

/// A protobuf message as it is written.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn varint(&mut self, field: u8, value: u64) {
        self.0.push(field << 3);
        self.number(value);
    }

    fn fixed64(&mut self, field: u8, value: f64) {
        self.0.push(field << 3 | 1);
        self.0.extend(value.to_le_bytes());
    }

    fn fixed32(&mut self, field: u8, value: f32) {
        self.0.push(field << 3 | 5);
        self.0.extend(value.to_le_bytes());
    }

    fn bytes(&mut self, field: u8, value: &[u8]) {
        self.0.push(field << 3 | 2);
        self.number(value.len() as u64);
        self.0.extend(value);
    }

    fn number(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }
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
    crc32c(data).rotate_right(15).wrapping_add(0xA282_EAD8)
}

/// CRC-32C (Castagnoli), bit by bit: event files are small.
fn crc32c(data: &[u8]) -> u32 {
    let step = |crc: u32, &byte: &u8| {
        (0..8).fold(
            crc ^ u32::from(byte),
            |crc, _| if crc & 1 == 1 { crc >> 1 ^ 0x82F6_3B78 } else { crc >> 1 },
        )
    };
    !data.iter().fold(!0, step)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksum_is_castagnoli_s() {
        // RFC 3720, appendix B.4.
        assert_eq!(crc32c(&[0; 32]), 0x8A91_36AA);
        assert_eq!(crc32c(b"123456789"), 0xE306_9283);
    }

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
