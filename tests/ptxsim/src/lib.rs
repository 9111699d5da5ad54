//! Runs the PTX that NVRTC really emits on the CPU, warp by warp and block by block, and finds what
//! compute-sanitizer would: accesses out of bounds, races, reads of what was never written, copies that were not
//! waited for, diverged barriers. Knows nothing of the engine or its kernels.
//!
//! ```text
//! text ── syntax ──▶ items ── decode (alu) ──▶ program ── device ▶ block ▶ execute ──▶ counts, or a fault
//!                                                            └──── global, shared, warp: memory that remembers
//! ```
//!
//! ```
//! use ptxsim::{Arg, Device, Launch, Module};
//!
//! let module = Module::parse(
//!     ".version 7.0 .target sm_80 .address_size 64
//!      .visible .entry double_it(.param .u64 x) {
//!          .reg .b32 %r<3>; .reg .b64 %rd<3>;
//!          ld.param.u64 %rd0, [x];
//!          mov.u32 %r0, %tid.x;
//!          mul.wide.u32 %rd1, %r0, 4;
//!          add.s64 %rd2, %rd0, %rd1;
//!          ld.global.u32 %r1, [%rd2];
//!          add.u32 %r2, %r1, %r1;
//!          st.global.u32 [%rd2], %r2;
//!          ret;
//!      }",
//! )
//! .unwrap();
//! let mut device = Device::new();
//! let x = device.allocate(8);
//! device.write(x, &[1, 0, 0, 0, 2, 0, 0, 0]);
//! let launch = Launch { grid: [1, 1, 1], block: [2, 1, 1], shared: 0 };
//! device.launch(&module, "double_it", &launch, &[Arg::Pointer(x)]).unwrap();
//! assert_eq!(device.read(x, 8), [2, 0, 0, 0, 4, 0, 0, 0]);
//! ```

mod alu;
mod block;
mod counts;
mod decode;
mod device;
mod execute;
mod fault;
mod global;
mod lanes;
mod module;
mod number;
mod program;
mod shared;
mod syntax;
mod warp;

pub use counts::Counts;
pub use device::{Arg, Device, Launch, Order};
pub use fault::{Fault, FaultKind};
pub use module::Module;
pub use syntax::ParseError;
