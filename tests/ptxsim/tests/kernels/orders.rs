//! Results that may not depend on which warp or block runs first.

use std::fmt::Debug;

use ptxsim::{Device, Fault, FaultKind, Order};

/// What `work` makes on a fresh device, the same with warps and blocks run in either order.
#[track_caller]
pub(crate) fn in_both_orders<R: PartialEq + Debug>(work: impl Fn(&mut Device) -> R) -> R {
    let run = |order| {
        let mut device = Device::new();
        device.order(order);
        work(&mut device)
    };
    let forward = run(Order::Forward);
    assert!(forward == run(Order::Reverse), "the order of warps and blocks changes the result");
    forward
}

/// Whether a fault is what a missing barrier leads to: a race, or a read of what another warp has still to write.
pub(crate) fn is_unordered(fault: &Fault) -> bool {
    matches!(fault.kind, FaultKind::SharedRace | FaultKind::UninitialisedShared)
}
