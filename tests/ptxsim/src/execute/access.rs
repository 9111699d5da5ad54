//! Loads, stores and atomics.

use super::Machine;
use crate::decode::{CONSTANT_WINDOW, LOCAL_WINDOW, SHARED_WINDOW, WINDOW_BYTES};
use crate::fault::{FaultKind, Mistake};
use crate::global::little_endian;
use crate::lanes::{Lanes, Mask, lanes_of, low_bits, sign_extend};
use crate::program::{Atomic, Load, Store};
use crate::syntax::Space;
use crate::warp::Warp;

/// The memory that an address is in, and the address there.
pub(super) fn resolve(space: Space, address: u64) -> (Space, u64) {
    if space == Space::Shared && (SHARED_WINDOW..SHARED_WINDOW + WINDOW_BYTES).contains(&address) {
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

#[inline]
fn check_alignment(address: u64, bytes: usize) -> Result<(), Mistake> {
    if address.is_multiple_of(bytes as u64) {
        return Ok(());
    }
    let detail = format!("an access of {bytes} bytes at an address that is no multiple of {bytes}");
    Err(Mistake::at(FaultKind::Misaligned, address, detail))
}

impl Machine<'_> {
    pub(super) fn load(&mut self, warp: &mut Warp, load: &Load, active: Mask) -> Result<(), Mistake> {
        match load.bytes * load.to.len() {
            1 => self.load_bytes::<1>(warp, load, active),
            2 => self.load_bytes::<2>(warp, load, active),
            4 => self.load_bytes::<4>(warp, load, active),
            8 => self.load_bytes::<8>(warp, load, active),
            16 => self.load_bytes::<16>(warp, load, active),
            32 => self.load_bytes::<32>(warp, load, active),
            bytes => Err(unknown_width(bytes)),
        }
    }

    /// A load of `BYTES` bytes a lane.
    fn load_bytes<const BYTES: usize>(
        &mut self,
        warp: &mut Warp,
        load: &Load,
        active: Mask,
    ) -> Result<(), Mistake> {
        let bases = *warp.register(load.address.base);
        let mut seen = Seen::default();
        for lane in lanes_of(active) {
            let (space, address) = resolve(load.address.space, load.address.of(bases[lane]));
            let value: [u8; BYTES] = self
                .load_lane(warp, (space, address), (lane, load.is_atomic))
                .map_err(|mistake| mistake.in_lane(lane))?;
            seen.add(space, lane, address);
            if let [Some(register)] = load.to[..] {
                let bits = if BYTES == 4 { word(&value) } else { little_endian(&value) };
                warp.registers[register as usize][lane] = extended(bits, load);
                continue;
            }
            for (register, part) in load.to.iter().zip(value.chunks_exact(load.bytes)) {
                let Some(register) = register else { continue };
                let bits = if load.bytes == 4 { word(part) } else { little_endian(part) };
                warp.registers[*register as usize][lane] = extended(bits, load);
            }
        }
        self.tally.accesses(&seen, BYTES, false);
        Ok(())
    }

    fn load_lane<const BYTES: usize>(
        &mut self,
        warp: &Warp,
        (space, address): (Space, u64),
        (lane, is_atomic): (usize, bool),
    ) -> Result<[u8; BYTES], Mistake> {
        check_alignment(address, BYTES)?;
        match space {
            Space::Global | Space::Generic => self.global.read(address, is_atomic),
            Space::Shared => self.shared.read(warp.thread(lane), address, is_atomic),
            Space::Local => warp.local_read(lane, address),
            Space::Constant => constant(self.module.constants(), address),
            Space::Parameter => constant(self.parameters, address),
        }
    }

    pub(super) fn store(&mut self, warp: &mut Warp, store: &Store, active: Mask) -> Result<(), Mistake> {
        match store.bytes * store.from.len() {
            1 => self.store_bytes::<1>(warp, store, active),
            2 => self.store_bytes::<2>(warp, store, active),
            4 => self.store_bytes::<4>(warp, store, active),
            8 => self.store_bytes::<8>(warp, store, active),
            16 => self.store_bytes::<16>(warp, store, active),
            32 => self.store_bytes::<32>(warp, store, active),
            bytes => Err(unknown_width(bytes)),
        }
    }

    /// A store of `BYTES` bytes a lane.
    fn store_bytes<const BYTES: usize>(
        &mut self,
        warp: &mut Warp,
        store: &Store,
        active: Mask,
    ) -> Result<(), Mistake> {
        let bases = *warp.register(store.address.base);
        let mut seen = Seen::default();
        for lane in lanes_of(active) {
            let (space, address) = resolve(store.address.space, store.address.of(bases[lane]));
            let mut value = [0; BYTES];
            for (part, register) in value.chunks_exact_mut(store.bytes).zip(&store.from) {
                part.copy_from_slice(&warp.register(*register)[lane].to_le_bytes()[..store.bytes]);
            }
            let stored = check_alignment(address, BYTES).and_then(|()| match space {
                Space::Global | Space::Generic => self.global.write(address, value, store.is_atomic),
                Space::Shared => self.shared.write(warp.thread(lane), address, value, store.is_atomic),
                Space::Local => warp.local_write(lane, address, &value),
                Space::Constant | Space::Parameter => {
                    let detail = "a store to a constant; variables of a module cannot be written here";
                    Err(Mistake::at(FaultKind::ConstantOutOfBounds, address, detail))
                }
            });
            stored.map_err(|mistake| mistake.in_lane(lane))?;
            seen.add(space, lane, address);
        }
        self.tally.accesses(&seen, BYTES, true);
        Ok(())
    }

    pub(super) fn atomic(&mut self, warp: &mut Warp, atomic: &Atomic, active: Mask) -> Result<(), Mistake> {
        let bases = *warp.register(atomic.address.base);
        let [a, b] = atomic.from.map(|register| *warp.register(register));
        for lane in lanes_of(active) {
            let (space, address) = resolve(atomic.address.space, atomic.address.of(bases[lane]));
            let update = |old| (atomic.update)(old, a[lane], b[lane]);
            let old = check_alignment(address, atomic.bytes).and_then(|()| match (space, atomic.bytes) {
                (Space::Global | Space::Generic, 4) => self.global.update::<4>(address, update),
                (Space::Global | Space::Generic, 8) => self.global.update::<8>(address, update),
                (Space::Shared, 4) => self.shared.update::<4>(warp.thread(lane), address, update),
                (Space::Shared, 8) => self.shared.update::<8>(warp.thread(lane), address, update),
                (Space::Global | Space::Generic | Space::Shared, bytes) => Err(unknown_width(bytes)),
                _ => Err(Mistake::at(FaultKind::OutOfBounds, address, "an atomic on memory of one thread")),
            });
            let old = old.map_err(|mistake| mistake.in_lane(lane))?;
            if let Some(to) = atomic.to {
                warp.registers[to as usize][lane] = old;
            }
        }
        Ok(())
    }
}

/// A signed part fills its register with its sign.
fn extended(bits: u64, load: &Load) -> u64 {
    match load.extend_to {
        Some(width) => sign_extend(bits, 8 * load.bytes as u32) as u64 & low_bits(width),
        None => bits,
    }
}

fn word(bytes: &[u8]) -> u64 {
    u64::from(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
}

fn unknown_width(bytes: usize) -> Mistake {
    Mistake::new(
        FaultKind::UnknownInstruction,
        format!("the interpreter does not know accesses of {bytes} bytes"),
    )
}

fn constant<const BYTES: usize>(constants: &[u8], address: u64) -> Result<[u8; BYTES], Mistake> {
    let found = usize::try_from(address).ok().and_then(|at| constants.get(at..)?.first_chunk());
    found.copied().ok_or_else(|| {
        let detail = format!("{BYTES} bytes at {address} of {} constant bytes", constants.len());
        Mistake::at(FaultKind::ConstantOutOfBounds, address, detail)
    })
}

/// The addresses of a warp's access, by memory.
#[derive(Default)]
pub(crate) struct Seen {
    pub(crate) global: Mask,
    pub(crate) shared: Mask,
    pub(crate) addresses: Lanes,
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
