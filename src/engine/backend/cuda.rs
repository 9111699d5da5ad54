//! The backend on a CUDA device: every operation is a kernel of `kernels/`, launched over buffers that stay in the
//! device's memory. Activations are bfloat16, sums f32.

mod device;

pub(crate) use device::DeviceBuffer;
