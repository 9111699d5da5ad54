//! What a kernel is given: addresses of buffers that are on the device already, or that are brought there for one
//! operation and back; lists of indices; weights.

use std::sync::Arc;

use half::bf16;

use super::super::{Buffer, Precision, Span};
use super::Cuda;
use super::device::{Arg, Device, DeviceBuffer};
use crate::matrix::{Bytes, Matrix, Values};
use crate::quant::Nf4;

/// Values that an operation reads.
pub(super) struct Input {
    address: u64,
    /// Of a buffer that was elsewhere.
    _brought: Option<DeviceBuffer>,
}

/// Values that an operation changes.
pub(super) struct Output<'b> {
    address: u64,
    brought: Option<(DeviceBuffer, &'b mut Buffer)>,
}

impl Input {
    pub(super) fn arg(&self) -> Arg {
        Arg::Pointer(self.address)
    }

    /// The address of the value `index`.
    pub(super) fn at(&self, index: usize, precision: Precision) -> Arg {
        Arg::Pointer(self.address + (index * precision.bytes()) as u64)
    }
}

impl Output<'_> {
    pub(super) fn arg(&self) -> Arg {
        Arg::Pointer(self.address)
    }

    /// The address of the value `index`.
    pub(super) fn at(&self, index: usize, precision: Precision) -> Arg {
        Arg::Pointer(self.address + (index * precision.bytes()) as u64)
    }
}

/// Takes back what was brought.
impl Drop for Output<'_> {
    fn drop(&mut self) {
        if let Some((brought, home)) = &mut self.brought {
            let values = brought.to_host();
            home.update(|home| home.copy_from_slice(&values));
        }
    }
}

/// Bytes on the device that operations only read.
#[derive(Debug)]
pub(crate) struct Constant {
    device: Arc<dyn Device>,
    address: u64,
    len: usize,
}

impl Constant {
    pub(super) fn new(device: &Arc<dyn Device>, bytes: &[u8]) -> Self {
        device.usage().take(bytes.len());
        let address = device.allocate(bytes.len().max(1));
        device.write(address, bytes);
        Self { device: device.clone(), address, len: bytes.len() }
    }

    pub(super) fn arg(&self) -> Arg {
        Arg::Pointer(self.address)
    }

    pub(super) fn to_host(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len];
        self.device.read(self.address, &mut bytes);
        bytes
    }
}

impl Drop for Constant {
    fn drop(&mut self) {
        self.device.usage().give_back(self.len);
        self.device.free(self.address);
    }
}

/// A weight on a device.
#[derive(Debug, Clone)]
pub struct DeviceMatrix(pub(super) Encoded);

#[derive(Debug, Clone)]
pub(super) enum Encoded {
    Bf16(Arc<DeviceBuffer>),
    /// Packed codes, and f32 scales of blocks of 64.
    Nf4 {
        packed: Arc<Constant>,
        absmax: Arc<DeviceBuffer>,
    },
}

impl DeviceMatrix {
    /// Bytes on the device.
    pub(crate) fn size_bytes(&self, values: usize) -> usize {
        match &self.0 {
            Encoded::Bf16(_) => 2 * values,
            Encoded::Nf4 { absmax, .. } => values.div_ceil(2) + 4 * absmax.len(),
        }
    }

    /// The weight in host memory, of `len` values.
    pub(crate) fn to_host(&self, len: usize) -> Values {
        match &self.0 {
            Encoded::Bf16(values) => {
                let bytes =
                    values.to_host().iter().flat_map(|&value| bf16::from_f32(value).to_le_bytes()).collect();
                Values::Bf16(Bytes::owned(bytes))
            }
            Encoded::Nf4 { packed, absmax } => Values::Nf4(Nf4 {
                packed: Bytes::owned(packed.to_host()),
                absmax: absmax.to_host().into(),
                len,
            }),
        }
    }
}

/// Indices and spans that kernels were given lately, by their bytes: every layer of a pass asks for the same ones.
#[derive(Debug, Default)]
pub(super) struct Lists(std::collections::HashMap<Vec<u8>, Arc<Constant>>);

/// Lists that are kept at most.
const LISTS: usize = 256;

impl Cuda {
    /// The values of `buffer` for a kernel that reads them as `precision`.
    pub(super) fn input(&self, buffer: &Buffer, precision: Precision) -> Input {
        match buffer.device().filter(|values| values.precision() == precision) {
            Some(values) => Input { address: values.at(precision), _brought: None },
            None => {
                let brought = DeviceBuffer::of(&self.device, &buffer.host(), precision);
                Input { address: brought.at(precision), _brought: Some(brought) }
            }
        }
    }

    /// The values of `buffer` for a kernel that changes them as `precision`.
    pub(super) fn output<'b>(&self, buffer: &'b mut Buffer, precision: Precision) -> Output<'b> {
        let here = buffer
            .device()
            .filter(|values| values.precision() == precision)
            .map(|values| values.at(precision));
        match here {
            Some(address) => Output { address, brought: None },
            None => {
                let brought = DeviceBuffer::of(&self.device, &buffer.host(), precision);
                Output { address: brought.at(precision), brought: Some((brought, buffer)) }
            }
        }
    }

    /// A list as i32.
    pub(super) fn list(&self, values: impl Iterator<Item = usize>) -> Arc<Constant> {
        self.bytes(values.flat_map(|value| (value as i32).to_le_bytes()).collect())
    }

    /// Spans as six i32 each: the ends of queries, keys and prefix.
    pub(super) fn spans(&self, spans: &[Span]) -> Arc<Constant> {
        let ends = |span: &Span| {
            [&span.queries, &span.keys, &span.prefix].map(|range| [range.start, range.end]).concat()
        };
        self.list(spans.iter().flat_map(ends))
    }

    pub(super) fn bytes(&self, bytes: Vec<u8>) -> Arc<Constant> {
        let mut lists = self.lists.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(known) = lists.0.get(&bytes) {
            return known.clone();
        }
        if lists.0.len() >= LISTS {
            lists.0.clear();
        }
        let list = Arc::new(Constant::new(&self.device, &bytes));
        lists.0.insert(bytes, list.clone());
        list
    }

    /// Brings a weight to the device: NF4 as it is, everything else as bf16.
    pub(super) fn matrix(&self, matrix: &Matrix) -> DeviceMatrix {
        match &matrix.values {
            Values::Device(here) => here.clone(),
            Values::Nf4(nf4) => DeviceMatrix(Encoded::Nf4 {
                packed: Arc::new(Constant::new(&self.device, nf4.packed.as_slice())),
                absmax: Arc::new(DeviceBuffer::of(&self.device, &nf4.absmax, Precision::Exact)),
            }),
            _ => {
                let values = DeviceBuffer::of(&self.device, &matrix.to_f32(), Precision::Rounded);
                DeviceMatrix(Encoded::Bf16(Arc::new(values)))
            }
        }
    }
}
