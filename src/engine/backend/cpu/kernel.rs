//! The instruction sets that products are compiled for, and which of them this process uses: the last one of
//! [`Kernel::here`], or that which `TUNESMITH_CPU` names. What a product is and that it is computed; how, is in
//! `tile`.

use std::sync::OnceLock;

use super::NoSuchSet;
use super::tile::Multiply;
use super::vector::{Lanes, Portable, Vector};

/// Columns of a panel.
pub(super) const PANEL: usize = 16;

/// The instruction set of a backend's products. Exists only where the CPU has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Kernel(Set);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Set {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// AMX where factors may be rounded to bfloat16, AVX-512 where not.
    #[cfg(target_arch = "x86_64")]
    Amx,
}

/// One product: c (rows, cols) = or += scale * a (rows, depth) · b (depth, cols). Distances in values.
#[derive(Clone, Copy)]
pub(super) struct Product {
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) depth: usize,
    pub(super) scale: f32,
    /// Whether to add to c.
    pub(super) add: bool,
    pub(super) a: *const f32,
    pub(super) a_row: usize,
    pub(super) a_depth: usize,
    /// Panels of sixteen columns, the last padded: value (k, j) is `b[j / 16 * b_panel + k * b_depth + j % 16]`.
    pub(super) b: *const f32,
    pub(super) b_depth: usize,
    pub(super) b_panel: usize,
    pub(super) c: *mut f32,
    pub(super) c_row: usize,
}

impl Kernel {
    /// All that this CPU has, the fastest last.
    pub(super) fn here() -> Vec<Self> {
        let mut sets = vec![Set::Portable];
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c");
            let avx512 = avx2
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512bw");
            sets.extend(avx2.then_some(Set::Avx2));
            sets.extend(avx512.then_some(Set::Avx512));
            sets.extend((avx512 && super::amx::is_here()).then_some(Set::Amx));
        }
        sets.into_iter().map(Self).collect()
    }

    /// The one this process uses, found once: `TUNESMITH_CPU`'s, or the fastest.
    ///
    /// # Errors
    /// The variable names none of [`Kernel::here`].
    pub(super) fn chosen() -> Result<Self, NoSuchSet> {
        static CHOSEN: OnceLock<Result<Kernel, NoSuchSet>> = OnceLock::new();
        let asked = || std::env::var_os("TUNESMITH_CPU").filter(|name| !name.is_empty());
        CHOSEN.get_or_init(|| Self::of(asked().as_deref())).clone()
    }

    /// The fastest one here, or the one of that name.
    fn of(asked: Option<&std::ffi::OsStr>) -> Result<Self, NoSuchSet> {
        let here = Self::here();
        let found = match asked {
            None => here.last(),
            Some(name) => here.iter().find(|kernel| name == kernel.name()),
        };
        found.copied().ok_or_else(|| NoSuchSet {
            asked: asked.unwrap_or_default().to_string_lossy().into_owned(),
            here: here.into_iter().map(Self::name).collect(),
        })
    }

    /// How `TUNESMITH_CPU` calls it.
    pub(super) fn name(self) -> &'static str {
        match self.0 {
            Set::Portable => "portable",
            #[cfg(target_arch = "x86_64")]
            Set::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Set::Avx512 => "avx512",
            #[cfg(target_arch = "x86_64")]
            Set::Amx => "amx",
        }
    }

    /// The numerics class: what the bits of a product depend on. Fused multiply-adds give the same on eight lanes
    /// and on sixteen, for every value is its own chain of them. The number counts the orders of sums there have
    /// been: raise it with every change of bits, for cached results are kept by it.
    pub(super) fn numerics(self) -> &'static str {
        match self.0 {
            Set::Portable if cfg!(target_arch = "aarch64") => "neon-f32.3",
            Set::Portable => "portable-f32.3",
            #[cfg(target_arch = "x86_64")]
            Set::Avx2 | Set::Avx512 => "fma-f32.3",
            #[cfg(target_arch = "x86_64")]
            Set::Amx => "amx-bf16.1",
        }
    }

    /// Whether products have registers of sixteen lanes, which few rows fill with two panels side by side only.
    pub(super) fn is_wide(self) -> bool {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Set::Avx512 | Set::Amx => true,
            _ => false,
        }
    }

    /// Whether products whose factors may be rounded to bfloat16 are to be AMX's.
    pub(super) fn rounds(self) -> bool {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Set::Amx => true,
            _ => false,
        }
    }

    /// Computes `product` in f32.
    ///
    /// # Safety
    /// All its pointers and distances must be in bounds, c exclusively held, and every panel of b sixteen wide.
    pub(super) unsafe fn multiply(self, product: &Product) {
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx512f")]
        unsafe fn avx512(product: &Product) {
            // SAFETY: passed on.
            unsafe { super::tile::multiply_wide::<super::vector::Zmm>(product) }
        }
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as promised by the caller; a kernel exists only where its instructions do.
            Set::Avx512 | Set::Amx => unsafe { avx512(product) },
            // SAFETY: as above.
            _ => unsafe { self.run(Multiply(product)) },
        }
    }

    /// Runs `work` over the widest register of this instruction set.
    ///
    /// # Safety
    /// What `work` asks for.
    pub(super) unsafe fn run_widest(self, work: impl LanesWork) {
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,fma")]
        unsafe fn avx2(work: impl LanesWork) {
            // SAFETY: passed on.
            unsafe { work.run::<super::vector::Avx2>() }
        }
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx512f")]
        unsafe fn avx512(work: impl LanesWork) {
            // SAFETY: passed on.
            unsafe { work.run::<super::vector::Zmm>() }
        }
        match self.0 {
            // SAFETY: passed on.
            Set::Portable => unsafe { work.run::<Portable>() },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: passed on; this value exists only where the CPU has the instructions.
            Set::Avx2 => unsafe { avx2(work) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Set::Avx512 | Set::Amx => unsafe { avx512(work) },
        }
    }

    /// Runs `work` compiled for this instruction set.
    ///
    /// # Safety
    /// What `work` asks for.
    #[inline]
    pub(super) unsafe fn run(self, work: impl Work) {
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,fma,f16c")]
        unsafe fn avx2(work: impl Work) {
            // SAFETY: passed on.
            unsafe { work.run::<super::vector::Avx2>() }
        }
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512vl,avx512bw")]
        unsafe fn avx512(work: impl Work) {
            // SAFETY: passed on.
            unsafe { work.run::<super::vector::Avx512>() }
        }
        match self.0 {
            // SAFETY: passed on.
            Set::Portable => unsafe { work.run::<Portable>() },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: passed on; this value exists only where the CPU has the instructions.
            Set::Avx2 => unsafe { avx2(work) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Set::Avx512 | Set::Amx => unsafe { avx512(work) },
        }
    }
}

/// A loop written over any register of f32.
pub(super) trait LanesWork {
    /// # Safety
    /// As of [`Work::run`].
    unsafe fn run<L: Lanes>(self);
}

/// A loop written over any vector.
pub(super) trait Work {
    /// # Safety
    /// The CPU must have V's instructions; the implementor may ask for more. Must be `inline(always)`, or the
    /// body is compiled without them.
    unsafe fn run<V: Vector>(self);
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;

    use super::Kernel;

    #[test]
    fn fastest_set_is_taken_unless_one_is_named() {
        assert_eq!(Kernel::of(None).unwrap(), *Kernel::here().last().unwrap());
        for kernel in Kernel::here() {
            assert_eq!(Kernel::of(Some(OsStr::new(kernel.name()))).unwrap(), kernel);
        }
    }

    #[test]
    fn set_that_is_not_here_is_an_error_that_lists_those_that_are() {
        let error = Kernel::of(Some(OsStr::new("mmx"))).unwrap_err().to_string();
        assert!(error.starts_with("`TUNESMITH_CPU` asks for `mmx`"), "{error}");
        assert!(error.contains("`portable`"), "{error}");
    }
}
