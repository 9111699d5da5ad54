//! The interpreter itself, on PTX written by hand with known answers. Needs no NVRTC.

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
