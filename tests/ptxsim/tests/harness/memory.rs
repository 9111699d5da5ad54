//! Arrays of numbers to and from the device.

use ptxsim::Device;

/// A number as memory holds it, little end first.
pub(crate) trait Element: Copy {
    const BYTES: usize;
    fn put(self, bytes: &mut Vec<u8>);
    fn take(bytes: &[u8]) -> Self;
}

macro_rules! element {
    ($($number:ty),*) => {$(
        impl Element for $number {
            const BYTES: usize = size_of::<$number>();
            fn put(self, bytes: &mut Vec<u8>) {
                bytes.extend(self.to_le_bytes());
            }
            fn take(bytes: &[u8]) -> Self {
                Self::from_le_bytes(bytes.try_into().expect("`BYTES` bytes"))
            }
        }
    )*};
}
element!(u8, u16, i32, u32, i64, u64, f32, f64);

/// The address of a new array with these values.
pub(crate) fn upload<T: Element>(device: &mut Device, values: &[T]) -> u64 {
    let mut bytes = Vec::with_capacity(values.len() * T::BYTES);
    values.iter().for_each(|value| value.put(&mut bytes));
    let address = device.allocate(bytes.len());
    device.write(address, &bytes);
    address
}

pub(crate) fn download<T: Element>(device: &Device, address: u64, count: usize) -> Vec<T> {
    device.read(address, count * T::BYTES).chunks_exact(T::BYTES).map(T::take).collect()
}

/// The address of a new array of bf16, the values rounded to nearest, ties to even.
pub(crate) fn upload_bf16(device: &mut Device, values: &[f32]) -> u64 {
    let bits: Vec<u16> = values.iter().map(|&value| bf16_bits(value)).collect();
    upload(device, &bits)
}

pub(crate) fn download_bf16(device: &Device, address: u64, count: usize) -> Vec<f32> {
    download::<u16>(device, address, count).into_iter().map(bf16_value).collect()
}

/// The bf16 nearest to `value`, ties to even.
pub(crate) fn bf16_bits(value: f32) -> u16 {
    let bits = value.to_bits();
    if value.is_nan() {
        return (bits >> 16) as u16 | 0x40;
    }
    (bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16) as u16
}

pub(crate) fn bf16_value(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// `value` as a bf16 holds it.
pub(crate) fn round_bf16(value: f32) -> f32 {
    bf16_value(bf16_bits(value))
}

pub(crate) fn round_bf16s(values: &[f32]) -> Vec<f32> {
    values.iter().map(|&value| round_bf16(value)).collect()
}
