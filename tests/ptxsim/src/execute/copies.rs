//! `cp.async`: copies from global to shared memory that arrive when they are waited for, and not before.

use super::Machine;
use super::access::{Seen, resolve};
use crate::fault::{FaultKind, Mistake};
use crate::lanes::{Mask, lanes_of};
use crate::program::CopyAsync;
use crate::shared::Thread;
use crate::syntax::Space;
use crate::warp::{Copy, Warp};

impl Machine<'_> {
    /// Starts a copy in each lane. The source is read now, the destination is out of bounds for everybody until the
    /// copy has been waited for.
    pub(super) fn copy(&mut self, warp: &mut Warp, copy: &CopyAsync, active: Mask) -> Result<(), Mistake> {
        let to = *warp.register(copy.to.base);
        let from = *warp.register(copy.from.base);
        let read = copy.read.map(|register| *warp.register(register));
        let mut seen = Seen::default();
        let mut shared = Seen::default();
        let mut bytes_read = 0;
        for lane in lanes_of(active) {
            let (_, to) = resolve(Space::Shared, copy.to.of(to[lane]));
            let (_, from) = resolve(Space::Global, copy.from.of(from[lane]));
            let read = read.map_or(copy.bytes, |read| read[lane] as u32 as usize);
            let bytes = self.fetch(warp.thread(lane), (to, from), copy.bytes, read);
            let bytes = bytes.map_err(|mistake| mistake.in_lane(lane))?;
            if read > 0 {
                seen.add(Space::Global, lane, from);
                bytes_read += read;
            }
            shared.add(Space::Shared, lane, to);
            let group = warp.committed[lane];
            warp.copies.push(Copy { lane, group, to, bytes, length: copy.bytes });
        }
        self.tally.copies(&seen, &shared, copy.bytes, bytes_read);
        Ok(())
    }

    fn fetch(
        &mut self,
        thread: Thread,
        (to, from): (u64, u64),
        length: usize,
        read: usize,
    ) -> Result<[u8; 16], Mistake> {
        if read > length {
            let detail = format!("{read} of {length} bytes are to be read");
            return Err(Mistake::at(FaultKind::OutOfBounds, from, detail));
        }
        for address in [to, from] {
            // Where nothing is read the source may be anywhere.
            if address % length as u64 != 0 && (read > 0 || address == to) {
                let detail =
                    format!("a copy of {length} bytes at an address that is no multiple of {length}");
                return Err(Mistake::at(FaultKind::Misaligned, address, detail));
            }
        }
        let mut bytes = [0; 16];
        if read > 0 {
            self.global.read_into(from, &mut bytes[..read])?;
        }
        self.shared.reserve(thread, to, length)?;
        Ok(bytes)
    }

    /// Delivers the copies of all but the last `pending` groups of each lane; without a number, of all.
    pub(super) fn wait_for_copies(&mut self, warp: &mut Warp, pending: Option<usize>, active: Mask) {
        if pending.is_none() {
            warp.commit_copies(active);
        }
        let pending = pending.unwrap_or(0) as u32;
        let (committed, index) = (warp.committed, warp.index);
        warp.copies.retain(|copy| {
            let is_due = active >> copy.lane & 1 == 1 && copy.group + pending < committed[copy.lane];
            if is_due {
                self.shared.deliver(
                    Thread { warp: index, lane: copy.lane as u8 },
                    copy.to,
                    &copy.bytes[..copy.length],
                );
            }
            !is_due
        });
    }
}

impl Warp {
    /// What a lane copies next belongs to another group.
    pub(super) fn commit_copies(&mut self, active: Mask) {
        for lane in lanes_of(active) {
            self.committed[lane] += 1;
        }
    }
}
