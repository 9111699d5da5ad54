//! Results that may not depend on which warp or block runs first.

use std::fmt::Debug;

use ptxsim::{Device, Order};

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
