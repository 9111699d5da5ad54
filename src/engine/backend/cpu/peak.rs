//! What the arithmetic and the memory of this machine give at most: loops with nothing in their way, which
//! benches hold the operations against. Written over the registers of the products' own instruction set. Knows no
//! clocks: whoever runs them times them.

use std::hint::black_box;

use super::Cpu;
use super::kernel::{Kernel, LanesWork, Work};
use super::vector::{LANES, Lanes, Vector};

/// Lanes of the widest register.
const WIDEST: usize = 16;
/// Multiply-adds that wait for none of the others: more than two units that take four cycles each can begin
/// meanwhile, and few enough for sixteen registers.
const CHAINS: usize = 12;

impl Cpu {
    /// Runs about `rounds` rounds of independent multiply-adds on every thread at once, in registers only. Gives the
    /// floating-point operations that all threads did together.
    pub fn spin(&self, rounds: usize) -> f64 {
        self.pool.broadcast(|_| self.kernel.spin(rounds)).into_iter().sum()
    }

    /// Reads `values` once, each thread a part of its own in order. Gives the bytes read.
    pub fn read(&self, values: &[f32]) -> f64 {
        let part = values.len() / self.threads() / (CHAINS * LANES) * (CHAINS * LANES);
        self.pool.broadcast(|context| {
            let values = &values[context.index() * part..][..part];
            // SAFETY: as above.
            unsafe { self.kernel.run(Read { values }) }
        });
        (self.threads() * part * size_of::<f32>()) as f64
    }
}

impl Kernel {
    /// What one thread does of [`Cpu::spin`].
    fn spin(self, rounds: usize) -> f64 {
        #[cfg(target_arch = "x86_64")]
        if self.rounds() {
            // SAFETY: a kernel exists only where its instructions do.
            return unsafe { super::amx::spin(rounds) };
        }
        let mut operations = 0;
        // SAFETY: the work asks for nothing but the kernel's instructions.
        unsafe { self.run_widest(Spin { rounds, operations: &mut operations }) };
        operations as f64
    }
}

struct Spin<'a> {
    rounds: usize,
    /// What was done.
    operations: &'a mut usize,
}

impl LanesWork for Spin<'_> {
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        // SAFETY: the CPU has L's instructions, says the caller.
        unsafe {
            let (factor, addend) = (L::splat(black_box(0.999)), L::splat(black_box(0.001)));
            let mut sums = [L::splat(black_box(0.5)); CHAINS];
            for _ in 0..self.rounds {
                for sum in &mut sums {
                    *sum = sum.mul_add(factor, addend);
                }
            }
            keep(&sums);
        }
        *self.operations = 2 * self.rounds * CHAINS * L::LANES;
    }
}

/// A whole number of times as many values as all chains have lanes.
struct Read<'a> {
    values: &'a [f32],
}

impl Work for Read<'_> {
    #[inline(always)]
    unsafe fn run<V: Vector>(self) {
        // SAFETY: as above; each chunk has a vector for each chain.
        unsafe {
            let one = V::splat(black_box(1.0));
            let mut sums = [V::splat(0.0); CHAINS];
            for chunk in self.values.chunks_exact(CHAINS * LANES) {
                for (chain, sum) in sums.iter_mut().enumerate() {
                    *sum = V::load(chunk.as_ptr().add(chain * LANES)).mul_add(one, *sum);
                }
            }
            keep(&sums);
        }
    }
}

/// Makes the compiler believe that someone looks at `sums`.
#[inline(always)]
unsafe fn keep<L: Lanes>(sums: &[L; CHAINS]) {
    let mut lanes = [0.0; WIDEST];
    for sum in sums {
        // SAFETY: as above; the lanes of one register have room.
        unsafe { sum.store(lanes.as_mut_ptr()) };
        black_box(&lanes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_is_that_of_all_threads() {
        let (one, two) = (Cpu::new(1).unwrap(), Cpu::new(2).unwrap());
        assert!(two.spin(10) == 2.0 * one.spin(10));
        let values = vec![1.0; 10 * CHAINS * LANES + 5];
        assert!(one.read(&values) == 4.0 * (values.len() - 5) as f64);
        assert!(two.read(&values) == 4.0 * (values.len() - 5) as f64);
    }
}
