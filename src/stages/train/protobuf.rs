//! The little of protobuf and of its usual wrapping that records of a run need: fields of a message, and CRC-32 with
//! either polynomial. Knows no message.

/// A protobuf message as it is written.
#[derive(Default)]
pub(super) struct Message(pub(super) Vec<u8>);

impl Message {
    pub(super) fn varint(&mut self, field: u32, value: u64) {
        self.tag(field, 0);
        self.number(value);
    }

    pub(super) fn fixed64(&mut self, field: u32, value: f64) {
        self.tag(field, 1);
        self.0.extend(value.to_le_bytes());
    }

    pub(super) fn fixed32(&mut self, field: u32, value: f32) {
        self.tag(field, 5);
        self.0.extend(value.to_le_bytes());
    }

    /// A text, bytes or another message.
    pub(super) fn bytes(&mut self, field: u32, value: &[u8]) {
        self.tag(field, 2);
        self.number(value.len() as u64);
        self.0.extend(value);
    }

    fn tag(&mut self, field: u32, kind: u32) {
        self.number(u64::from(field << 3 | kind));
    }

    fn number(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }
}

/// Castagnoli's polynomial, reversed: CRC-32C.
pub(super) const CASTAGNOLI: u32 = 0x82F6_3B78;
/// The polynomial of IEEE 802.3, reversed: what zlib calls CRC-32.
pub(super) const IEEE: u32 = 0xEDB8_8320;

/// CRC-32 with the given polynomial, bit by bit: records of a run are small.
pub(super) fn crc32(polynomial: u32, data: impl IntoIterator<Item = u8>) -> u32 {
    let bit = |crc: u32, _| if crc & 1 == 1 { crc >> 1 ^ polynomial } else { crc >> 1 };
    !data.into_iter().fold(!0, |crc, byte| (0..8).fold(crc ^ u32::from(byte), bit))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_are_the_published_ones() {
        // RFC 3720, appendix B.4, and the check value of the CRC catalogue.
        assert_eq!(crc32(CASTAGNOLI, [0; 32]), 0x8A91_36AA);
        assert_eq!(crc32(CASTAGNOLI, *b"123456789"), 0xE306_9283);
        assert_eq!(crc32(IEEE, *b"123456789"), 0xCBF4_3926);
    }

    #[test]
    fn fields_above_15_take_a_second_byte() {
        let mut message = Message::default();
        message.varint(17, 300);
        assert_eq!(message.0, [0x88, 0x01, 0xAC, 0x02]);
    }
}
