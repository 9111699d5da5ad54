//! The interpreter itself, on PTX written by hand with known answers. Needs no NVRTC.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod lanes;

mod interpreter {
    mod control;
    mod conversions;
    mod exchanges;
    mod faults;
    mod floats;
    mod integers;
    mod matrices;
    mod memory;
    mod reading;
}
