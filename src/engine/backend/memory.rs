//! Where values live: in host memory as f32, or on a device in the precision it computes with. A [`Buffer`] is
//! what models and adapters hold; only its backend knows what is in it.

use std::borrow::Cow;
use std::ops::{Deref, DerefMut};

use super::cuda::DeviceBuffer;

/// How a device stores values. Host memory is f32 throughout.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Precision {
    /// Activations and what they are multiplied with: bfloat16.
    Rounded,
    /// Sums, statistics, states and trained values: f32.
    Exact,
}

/// Values that a backend computes on. In host memory it is a slice of f32; on a device it can only be given to
/// operations of its backend, or fetched with [`Buffer::to_host`].
#[derive(Debug, Clone, PartialEq)]
pub struct Buffer(Storage);

#[derive(Debug, Clone, PartialEq)]
enum Storage {
    Host(Vec<f32>),
    Device(DeviceBuffer),
}

impl Buffer {
    /// `len` zeros in host memory.
    pub fn zeros(len: usize) -> Self {
        vec![0.0; len].into()
    }

    /// Gives a buffer in host memory the length `len`; contents are left over. Capacity never shrinks.
    pub(super) fn resize_host(&mut self, len: usize) {
        match &mut self.0 {
            Storage::Host(values) => values.resize(len, 0.0),
            Storage::Device(_) => *self = Self::zeros(len),
        }
    }

    /// The values in host memory, wherever they are.
    pub fn to_host(&self) -> Vec<f32> {
        match &self.0 {
            Storage::Host(values) => values.clone(),
            Storage::Device(values) => values.to_host(),
        }
    }

    /// Brings the values to host memory.
    pub(crate) fn fetch(&mut self) -> &mut [f32] {
        if let Storage::Device(values) = &self.0 {
            *self = values.to_host().into();
        }
        self
    }

    /// As [`Buffer::to_host`], without a copy where they are there.
    pub fn host(&self) -> Cow<'_, [f32]> {
        match &self.0 {
            Storage::Host(values) => Cow::Borrowed(values),
            Storage::Device(values) => Cow::Owned(values.to_host()),
        }
    }

    /// Lets `change` change the values in host memory, wherever they are.
    pub fn update(&mut self, change: impl FnOnce(&mut [f32])) {
        match &mut self.0 {
            Storage::Host(values) => change(values),
            Storage::Device(device) => {
                let mut values = device.to_host();
                change(&mut values);
                device.write(&values);
            }
        }
    }

    /// Number of values.
    pub fn len(&self) -> usize {
        match &self.0 {
            Storage::Host(values) => values.len(),
            Storage::Device(values) => values.len(),
        }
    }

    /// Whether there are no values.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The values on a device.
    pub(super) fn device(&self) -> Option<&DeviceBuffer> {
        match &self.0 {
            Storage::Host(_) => None,
            Storage::Device(values) => Some(values),
        }
    }

    /// The values on a device, to be changed.
    pub(super) fn device_mut(&mut self) -> Option<&mut DeviceBuffer> {
        match &mut self.0 {
            Storage::Host(_) => None,
            Storage::Device(values) => Some(values),
        }
    }
}

impl Default for Buffer {
    /// No values, in host memory.
    fn default() -> Self {
        Vec::new().into()
    }
}

impl From<Vec<f32>> for Buffer {
    fn from(values: Vec<f32>) -> Self {
        Self(Storage::Host(values))
    }
}

impl From<DeviceBuffer> for Buffer {
    fn from(values: DeviceBuffer) -> Self {
        Self(Storage::Device(values))
    }
}

impl FromIterator<f32> for Buffer {
    fn from_iter<I: IntoIterator<Item = f32>>(values: I) -> Self {
        Vec::from_iter(values).into()
    }
}

/// For what computes in host memory, whose buffers are all there.
impl Deref for Buffer {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match &self.0 {
            Storage::Host(values) => values,
            Storage::Device(_) => unreachable!("BUG: a device's values read as if they were in host memory"),
        }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        match &mut self.0 {
            Storage::Host(values) => values,
            Storage::Device(_) => {
                unreachable!("BUG: a device's values written as if they were in host memory")
            }
        }
    }
}
