//! Loads, stores and atomics.

use super::Machine;
use crate::decode::{CONSTANT_WINDOW, LOCAL_WINDOW, SHARED_WINDOW, WINDOW_BYTES};
use crate::fault::{FaultKind, Mistake};
use crate::global::little_endian;
use crate::lanes::{Lanes, Mask, lanes_of, low_bits, sign_extend};
use crate::program::{Atomic, Load, Store};
use crate::syntax::Space;
use crate::warp::Warp;

/// The widest access of a lane: four parts of 64 bits.
const BYTES_MAX: usize = 32;

/// The memory that an address is in, and the address there.
pub(super) fn resolve(space: Space, address: u64) -> (Space, u64) {
    if space == Space::Shared && address >= SHARED_WINDOW && address < SHARED_WINDOW + WINDOW_BYTES {
        return (Space::Shared, address - SHARED_WINDOW);
    }
    if !matches!(space, Space::Generic | Space::Global) {
        return (space, address);
    }
    let windows = [
        (Space::Shared, SHARED_WINDOW),
        (Space::Local, LOCAL_WINDOW),
        // Initialised global variables are kept with the constants.
        (Space::Constant, CONSTANT_WINDOW),
    ];
    windows
        .into_iter()
        .find(|(_, window)| address >= *window && address - window < WINDOW_BYTES)
        .map_or((Space::Global, address), |(space, window)| (space, address - window))
}

fn check_alignment(address: u64, bytes: usize) -> Result<(), Mistake> {
    if address % bytes as u64 == 0 {
        return Ok(());
    }
    let detail = format!("an access of {bytes} bytes at an address that is no multiple of {bytes}");
    Err(Mistake::at(FaultKind::Misaligned, address, detail))
}

impl Machine<'_> {
    pub(super) fn load(&mut self, warp: &mut Warp, load: &Load, active: Mask) -> Result<(), Mistake> {
        let bytes = load.bytes * load.to.len();
        let bases = *warp.register(load.address.base);
        let mut seen = Seen::default();
        for lane in lanes_of(active) {
            let (space, address) = resolve(load.address.space, load.address.of(bases[lane]));
            let mut value = [0; BYTES_MAX];
            let value = &mut value[..bytes];
            self.load_lane(warp, (space, address), value, (lane, load.is_atomic))
                .map_err(|mistake| mistake.in_lane(lane))?;
            seen.add(space, lane, address);
            for (register, part) in load.to.iter().zip(value.chunks_exact(load.bytes)) {
                let Some(register) = register else { continue };
                let mut bits = little_endian(part);
                if let Some(width) = load.extend_to {
                    bits = sign_extend(bits, 8 * load.bytes as u32) as u64 & low_bits(width);
                }
                warp.registers[*register as usize][lane] = bits;
            }
        }
        self.tally.accesses(&seen, bytes, false);
        Ok(())
    }

    fn load_lane(
        &mut self,
        warp: &Warp,
        (space, address): (Space, u64),
        value: &mut [u8],
        (lane, is_atomic): (usize, bool),
    ) -> Result<(), Mistake> {
        let bytes = value.len();
        check_alignment(address, bytes)?;
        let found = match space {
            Space::Global | Space::Generic => self.global.read(address, bytes, is_atomic)?,
            Space::Shared => self.shared.read(warp.index, address, bytes, is_atomic)?,
            Space::Local => warp.local_read(lane, address, bytes)?,
            Space::Constant => constant(self.module.constants(), address, bytes)?,
            Space::Parameter => constant(self.parameters, address, bytes)?,
        };
        value.copy_from_slice(found);
        Ok(())
    }

    pub(super) fn store(&mut self, warp: &mut Warp, store: &Store, active: Mask) -> Result<(), Mistake> {
        let bytes = store.bytes * store.from.len();
        let bases = *warp.register(store.address.base);
        let mut seen = Seen::default();
        for lane in lanes_of(active) {
            let (space, address) = resolve(store.address.space, store.address.of(bases[lane]));
            let mut value = [0; BYTES_MAX];
            let value = &mut value[..bytes];
            for (part, register) in value.chunks_exact_mut(store.bytes).zip(&store.from) {
                part.copy_from_slice(&warp.register(*register)[lane].to_le_bytes()[..store.bytes]);
            }
            let stored = check_alignment(address, bytes).and_then(|()| match space {
                Space::Global | Space::Generic => self.global.write(address, value, store.is_atomic),
                Space::Shared => self.shared.write(warp.index, address, value, store.is_atomic),
                Space::Local => warp.local_write(lane, address, value),
                Space::Constant | Space::Parameter => {
                    let detail = "a store to a constant; variables of a module cannot be written here";
                    Err(Mistake::at(FaultKind::ConstantOutOfBounds, address, detail))
                }
            });
            stored.map_err(|mistake| mistake.in_lane(lane))?;
            seen.add(space, lane, address);
        }
        self.tally.accesses(&seen, bytes, true);
        Ok(())
    }

    pub(super) fn atomic(&mut self, warp: &mut Warp, atomic: &Atomic, active: Mask) -> Result<(), Mistake> {
        let bases = *warp.register(atomic.address.base);
        let [a, b] = atomic.from.map(|register| *warp.register(register));
        for lane in lanes_of(active) {
            let (space, address) = resolve(atomic.address.space, atomic.address.of(bases[lane]));
            let update = |old| (atomic.update)(old, a[lane], b[lane]);
            let old = check_alignment(address, atomic.bytes).and_then(|()| match space {
                Space::Global | Space::Generic => self.global.update(address, atomic.bytes, update),
                Space::Shared => self.shared.update(warp.index, address, atomic.bytes, update),
                _ => Err(Mistake::at(
                    FaultKind::OutOfBounds,
                    address,
                    "an atomic on memory that is not shared",
                )),
            });
            let old = old.map_err(|mistake| mistake.in_lane(lane))?;
            if let Some(to) = atomic.to {
                warp.registers[to as usize][lane] = old;
            }
        }
        Ok(())
    }
}

fn constant(constants: &[u8], address: u64, bytes: usize) -> Result<&[u8], Mistake> {
    let range = usize::try_from(address).ok().and_then(|at| constants.get(at..at.checked_add(bytes)?));
    range.ok_or_else(|| {
        let detail = format!("{bytes} bytes at {address} of {} constant bytes", constants.len());
        Mistake::at(FaultKind::ConstantOutOfBounds, address, detail)
    })
}

/// The addresses of a warp's access, by memory.
pub(crate) struct Seen {
    pub(crate) global: Mask,
    pub(crate) shared: Mask,
    pub(crate) addresses: Lanes,
}

impl Default for Seen {
    fn default() -> Self {
        Self { global: 0, shared: 0, addresses: [0; 32] }
    }
}

impl Seen {
    pub(crate) fn add(&mut self, space: Space, lane: usize, address: u64) {
        self.addresses[lane] = address;
        match space {
            Space::Global | Space::Generic => self.global |= 1 << lane,
            Space::Shared => self.shared |= 1 << lane,
            _ => {}
        }
    }
}
