//! Names being changed: operations on one name of one directory take turns, so that what a
//! name stands for can't change between its look-up and the entry that was built on it.

use cfs_reactor::sync::Notify;
use cfs_wire::Ino;
use cfs_wire::meta::{MetaOp, Name};
use std::cell::RefCell;
use std::collections::BTreeSet;
use std::rc::Rc;

#[derive(Default)]
pub struct Names {
    held: RefCell<BTreeSet<(Ino, Name)>>,
    freed: Rc<Notify>,
}

pub struct NamesHeld {
    names: Rc<Names>,
    held: Vec<(Ino, Name)>,
}

impl Names {
    pub fn new() -> Rc<Names> {
        Rc::new(Names::default())
    }

    /// Waits for its turn on all of them; all or nothing, so that no two callers wait for each
    /// other.
    pub async fn acquire(self: &Rc<Self>, mut wanted: Vec<(Ino, Name)>) -> NamesHeld {
        wanted.sort();
        wanted.dedup();
        loop {
            let freed = self.freed.notified();
            {
                let mut held = self.held.borrow_mut();
                if !wanted.iter().any(|name| held.contains(name)) {
                    held.extend(wanted.iter().cloned());
                    return NamesHeld { names: self.clone(), held: wanted };
                }
            }
            freed.await;
        }
    }
}

impl Drop for NamesHeld {
    fn drop(&mut self) {
        {
            let mut held = self.names.held.borrow_mut();
            for name in &self.held {
                held.remove(name);
            }
        }
        self.names.freed.notify_all();
    }
}

/// The names an operation changes.
pub fn names_of(op: &MetaOp) -> Vec<(Ino, Name)> {
    match op {
        MetaOp::Create { dir, name, .. }
        | MetaOp::Link { dir, name, .. }
        | MetaOp::Unlink { dir, name }
        | MetaOp::Rmdir { dir, name } => vec![(*dir, name.clone())],
        MetaOp::Rename { dir, name, to_dir, to_name, .. } => {
            vec![(*dir, name.clone()), (*to_dir, to_name.clone())]
        }
        _ => Vec::new(),
    }
}
