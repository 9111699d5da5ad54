//! What the arithmetic and the memory of this machine give at most: loops with nothing in their way, which
//! benches hold the operations against. Written over the vector of the products' own instruction set. Knows no
//! clocks: whoever runs them times them.

use std::hint::black_box;

use super::Cpu;
use super::kernel::Work;
use super::vector::{LANES, Vector};

/// Multiply-adds that wait for none of the others: more than two units that take four cycles each can begin
/// meanwhile, and few enough for sixteen registers.
const CHAINS: usize = 12;

impl Cpu {
    /// Runs `rounds` rounds of independent multiply-adds on every thread at once, in registers only. Gives the
    /// floating-point operations that all threads did together.
    pub fn spin(&self, rounds: usize) -> f64 {
        self.pool.broadcast(|_| {
            // SAFETY: the work asks for nothing but the kernel's instructions.
            unsafe { self.kernel.run(Spin { rounds }) }
        });
        (self.threads() * rounds * CHAINS * LANES * 2) as f64
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

struct Spin {
    rounds: usize,
}

impl Work for Spin {
    #[inline(always)]
    unsafe fn run<V: Vector>(self) {
        // SAFETY: the CPU has V's instructions, says the caller.
        unsafe {
            let (factor, addend) = (V::splat(black_box(0.999)), V::splat(black_box(0.001)));
            let mut sums = [V::splat(black_box(0.5)); CHAINS];
            for _ in 0..self.rounds {
                for sum in &mut sums {
                    *sum = sum.mul_add(factor, addend);
                }
            }
            keep(&sums);
        }
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
unsafe fn keep<V: Vector>(sums: &[V; CHAINS]) {
    let mut lanes = [0.0; LANES];
    for sum in sums {
        // SAFETY: as above; the lanes of one vector have room.
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
