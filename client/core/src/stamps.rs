//! Whether something changed while a reply was on its way.
//!
//! A reply that was sent before an invalidation, or before a change of our own, may tell of the
//! state before it: it answers the program, but must not be cached.

use cfs_wire::Ino;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;

/// Inodes whose last change is remembered one by one; beyond it all are taken for changed.
const REMEMBERED_MAX: usize = 8192;

/// A moment in the order of changes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub(crate) struct Stamp(u64);

#[derive(Default)]
pub(crate) struct Stamps {
    clock: Cell<u64>,
    floor: Cell<u64>,
    changed: RefCell<BTreeMap<Ino, u64>>,
}

impl Stamps {
    pub fn now(&self) -> Stamp {
        Stamp(self.clock.get())
    }

    /// A call begins: later than every other so far.
    pub fn begin(&self) -> Stamp {
        self.clock.set(self.clock.get() + 1);
        self.now()
    }

    pub fn changed(&self, ino: Ino) {
        let next = self.clock.get() + 1;
        self.clock.set(next);
        let mut changed = self.changed.borrow_mut();
        changed.insert(ino, next);
        if changed.len() > REMEMBERED_MAX {
            changed.clear();
            self.floor.set(next);
        }
    }

    pub fn all_changed(&self) {
        let next = self.clock.get() + 1;
        self.clock.set(next);
        self.floor.set(next);
        self.changed.borrow_mut().clear();
    }

    /// Whether `ino` has not changed since.
    pub fn unchanged_since(&self, ino: Ino, stamp: Stamp) -> bool {
        let last = self.changed.borrow().get(&ino).copied().unwrap_or(0).max(self.floor.get());
        last <= stamp.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_taints_what_began_before_it_and_nothing_else() {
        let stamps = Stamps::default();
        let (one, two) = (Ino::from_u64(1), Ino::from_u64(2));
        let before = stamps.now();
        stamps.changed(one);
        assert!(!stamps.unchanged_since(one, before));
        assert!(stamps.unchanged_since(two, before));
        assert!(stamps.unchanged_since(one, stamps.now()));
        for ino in 10..10 + REMEMBERED_MAX as u64 {
            stamps.changed(Ino::from_u64(ino));
        }
        assert!(!stamps.unchanged_since(two, before), "beyond the bound everything counts as changed");
        assert!(stamps.unchanged_since(two, stamps.now()));
    }
}
