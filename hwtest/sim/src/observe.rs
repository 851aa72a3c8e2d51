//! The whole tree as a client sees it, and its comparison with the model.

use crate::content::difference;
use crate::model::{Model, ROOT};
use crate::op::{NodeId, shown};
use crate::report::{Checker, Violation};
use crate::sideline::PREFIX;
use crate::workload::list;
use cfs_client::{Client, OpenFlags};
use cfs_wire::meta::{Attr, FileKind};
use cfs_wire::{Errno, Ino};
use std::collections::BTreeMap;
use std::rc::Rc;

/// One inode, read in full.
#[derive(Clone, Debug)]
pub struct Observed {
    pub attr: Attr,
    pub names: Vec<(Vec<u8>, Ino)>,
    pub bytes: Vec<u8>,
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

/// All inodes reachable from the root.
pub type Tree = BTreeMap<Ino, Observed>;

/// Reads everything beneath the root.
pub async fn observe(client: &Rc<Client>) -> Result<Tree, Violation> {
    let mut tree = Tree::new();
    let mut waiting = vec![(client.root(), "/".to_owned())];
    while let Some((ino, path)) = waiting.pop() {
        if tree.contains_key(&ino) {
            continue;
        }
        let observed = observe_one(client, ino).await.map_err(|errno| {
            Violation::new(Checker::Contents, format!("{path} (inode {ino}) cannot be read: {errno}"))
        })?;
        for (name, child) in &observed.names {
            if !name.starts_with(PREFIX) {
                waiting.push((*child, format!("{path}{}/", shown(name))));
            }
        }
        tree.insert(ino, observed);
    }
    Ok(tree)
}

async fn observe_one(client: &Rc<Client>, ino: Ino) -> Result<Observed, Errno> {
    let attr = client.getattr(ino).await?.attr;
    let mut observed = Observed { names: Vec::new(), bytes: Vec::new(), xattrs: BTreeMap::new(), attr };
    match observed.attr.kind {
        FileKind::Directory => observed.names = list(client, ino).await?,
        FileKind::Symlink => observed.bytes = client.readlink(ino).await?,
        FileKind::File => observed.bytes = read_all(client, ino).await?,
        _ => {}
    }
    observed.xattrs = read_xattrs(client, ino).await?;
    Ok(observed)
}

/// All extended attributes of an inode.
pub async fn read_xattrs(client: &Rc<Client>, ino: Ino) -> Result<BTreeMap<Vec<u8>, Vec<u8>>, Errno> {
    let mut xattrs = BTreeMap::new();
    for name in client.listxattr(ino).await? {
        xattrs.insert(name.to_vec(), client.getxattr(ino, &name).await?);
    }
    Ok(xattrs)
}

/// All bytes of a file.
pub async fn read_all(client: &Rc<Client>, ino: Ino) -> Result<Vec<u8>, Errno> {
    const STEP: u32 = 300_000;
    let file = client.open(ino, OpenFlags::default(), false).await?;
    let mut bytes = Vec::new();
    let outcome = loop {
        match client.read(&file, bytes.len() as u64, STEP).await {
            Ok(part) if part.is_empty() => break Ok(()),
            Ok(part) => bytes.extend_from_slice(&part),
            Err(errno) => break Err(errno),
        }
    };
    client.release(&file);
    outcome.map(|()| bytes)
}

/// Who looked at the tree, and what may be lost from it.
#[derive(Clone, Copy)]
pub struct View<'a> {
    /// The client, if its programs are in the model.
    pub viewer: Option<usize>,
    /// Clients that died: their edits may be undone from the end.
    pub dead: &'a [usize],
}

/// Whether the tree is a legal state of the model; where a client died, what it left is taken
/// over.
pub fn reconcile(model: &mut Model, tree: &Tree, view: View<'_>) -> Result<(), Violation> {
    model.forget_times_of(view.dead);
    let mut inos: BTreeMap<NodeId, Ino> = BTreeMap::new();
    let mut waiting = vec![(ROOT, "/".to_owned())];
    let root = model.node(ROOT).ino.expect("the root is known");
    inos.insert(ROOT, root);
    let mut reached = Vec::new();
    while let Some((id, path)) = waiting.pop() {
        if reached.contains(&id) {
            continue;
        }
        reached.push(id);
        let ino = inos[&id];
        let Some(observed) = tree.get(&ino) else {
            return Err(Violation::new(Checker::Tree, format!("{path}: inode {ino} was not reached")));
        };
        compare(model, id, observed, &path, view)?;
        for (name, child) in model.node(id).names.clone() {
            let found = observed.names.iter().find(|(other, _)| *other == name).map(|(_, ino)| *ino);
            let Some(found) = found else { continue };
            let inside = format!("{path}{}/", shown(&name));
            if inos.insert(child, found).is_some_and(|before| before != found) {
                let detail = format!("{inside} is inode {found}, by another name it is not");
                return Err(Violation::new(Checker::Tree, detail));
            }
            if !model.node(child).opaque {
                waiting.push((child, inside));
            }
        }
    }
    for id in reached {
        let observed = &tree[&inos[&id]];
        let node = model.node_mut(id);
        node.ino = Some(observed.attr.ino);
        let attr = &observed.attr;
        if node.new.kind == FileKind::File {
            match (node.content.now() == observed.bytes, view.viewer) {
                (false, _) => node.adopt(&observed.bytes),
                (true, Some(viewer)) => node.content.seen_by(viewer),
                (true, None) => node.content.settle(),
            }
        }
        node.learn_times(attr);
    }
    Ok(())
}

fn compare(model: &Model, id: NodeId, observed: &Observed, path: &str, view: View<'_>) -> Result<(), Violation> {
    let wrong = |checker, detail: String| Err(Violation::new(checker, format!("{path} (node {}): {detail}", id.0)));
    let node = model.node(id);
    let mut attr = observed.attr.clone();
    if node.new.kind == FileKind::File {
        let lost = view.dead.iter().any(|client| node.content.is_pending_of(*client));
        if node.content.now() != observed.bytes && !(lost && node.content.allows(&observed.bytes)) {
            let differs = difference(node.content.now(), &observed.bytes);
            let died = if lost {
                format!("; no prefix of {} edits explains it", node.content.pending())
            } else {
                String::new()
            };
            return wrong(Checker::Contents, format!("{differs}{died}"));
        }
        if attr.size != observed.bytes.len() as u64 {
            return wrong(Checker::Tree, format!("size {} but {} bytes read", attr.size, observed.bytes.len()));
        }
        // Compared by the bytes already.
        attr.size = model.size(id);
    }
    if let Err(detail) = model.check_attr(id, &attr) {
        return wrong(Checker::Tree, detail);
    }
    if node.new.kind == FileKind::Symlink && node.new.target != observed.bytes {
        return wrong(Checker::Contents, "another target".to_owned());
    }
    let xattrs = node.all_xattrs();
    if xattrs != observed.xattrs {
        return wrong(Checker::Tree, format!("extended attributes {:?}, not {xattrs:?}", observed.xattrs));
    }
    let expected: Vec<&Vec<u8>> = node.names.keys().collect();
    let found: Vec<&Vec<u8>> = observed.names.iter().map(|(name, _)| name).collect();
    if expected != found {
        let names = |names: &[&Vec<u8>]| names.iter().map(|name| shown(name)).collect::<Vec<_>>().join(" ");
        return wrong(Checker::Tree, format!("holds [{}], not [{}]", names(&found), names(&expected)));
    }
    Ok(())
}
