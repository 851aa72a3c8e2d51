//! The operations on names, planned as [`Action`]s with the checks POSIX asks for.

use super::directory::{Found, check_name, is_dots, placement};
use super::entry::{Action, AncestorWalk, Answer, Facts, Reply, TxnId};
use super::keys;
use super::records::{Inode, RenameLockRecord};
use super::view::{Attempt, Fail, View};
use cfs_wire::limits::LINKS_MAX;
use cfs_wire::meta::{
    Entry, FileKind, Grant, MetaCall, MetaOp, MetaReply, Name, NewNode, RENAME_EXCHANGE, RENAME_NOREPLACE,
};
use cfs_wire::{Errno, Ino, SessionId, ShardId, Timestamp};

/// How far an operation got in its own entry.
pub(crate) enum Ran {
    Reply(MetaReply),
    /// It spans shards.
    Begun(TxnId),
}

/// Directories up to the root; a longer chain can only be a cycle in damaged state.
const DEPTH_MAX: usize = 1 << 20;

/// The source and target of a rename, as found.
struct Rename<'a> {
    dir: Ino,
    name: &'a Name,
    to_dir: Ino,
    to_name: &'a Name,
    exchange: bool,
    source: (Ino, FileKind),
    target: Option<(Ino, FileKind)>,
}

fn is_dir(kind: FileKind) -> bool {
    kind == FileKind::Directory
}

fn found(found: Found) -> (Ino, FileKind) {
    (found.ino, found.kind)
}

pub(crate) fn entry_reply(attr: cfs_wire::meta::Attr) -> MetaReply {
    MetaReply::Entry(Entry { attr, grant: Grant::default(), dir_grant: Grant::default() })
}

/// The client's reply, from what the actions of its operation answered.
pub(crate) fn reply_of(op: &MetaOp, answers: &[Answer]) -> MetaReply {
    let (mut made, mut gone, mut moved) = (None, None, Vec::new());
    for answer in answers {
        match answer {
            Answer::Attr(attr) => made = Some(attr),
            Answer::Links { ino, nlink } => gone = Some((*ino, *nlink)),
            Answer::Moved { ino } => moved.push(*ino),
            Answer::Nothing => {}
        }
    }
    match (op, made, gone) {
        (MetaOp::Rename { .. }, _, replaced) => {
            moved.sort_unstable();
            MetaReply::Renamed { moved, replaced }
        }
        (MetaOp::Create { .. } | MetaOp::Link { .. }, Some(attr), _) => entry_reply(attr.clone()),
        (_, _, Some((ino, nlink))) => MetaReply::Removed { ino, nlink },
        _ => MetaReply::Done,
    }
}

impl View<'_> {
    pub(crate) async fn namespace(&mut self, call: &MetaCall, now: Timestamp, facts: &Facts) -> Attempt<Ran> {
        let session = call.id.session;
        match &call.op {
            MetaOp::Create { dir, name, node, hold } => self.create(call, *dir, name, node, *hold, now).await,
            MetaOp::Tmpfile { dir, node } => {
                let parent = self.directory(*dir).await?;
                if node.kind != FileKind::File {
                    return Err(Errno::EINVAL.into());
                }
                let (mut inode, xattrs) = self.new_inode(&parent, node, now).await?;
                inode.ino = self.next_ino()?;
                inode.nlink = 0;
                inode.tmpfile = true;
                self.add_inode(&inode, &xattrs);
                self.put(keys::orphan(self.shard, inode.ino), &());
                Ok(Ran::Reply(self.opened_reply(&inode, session)))
            }
            MetaOp::Link { ino, dir, name } => {
                check_name(name)?;
                self.directory(*dir).await?;
                if is_dots(name) || self.lookup(*dir, name).await?.is_some() {
                    return Err(Errno::EEXIST.into());
                }
                let (name, ino) = (name.clone(), *ino);
                let (kind, replaces, links) = (FileKind::File, None, 0);
                let insert = Action::Insert { dir: *dir, name, ino: Some(ino), kind, replaces, links, now };
                let plan = vec![(ino.shard(), Action::AddLink { ino, session, now }), (self.shard, insert)];
                self.run(call, plan).await
            }
            MetaOp::Unlink { dir, name } => {
                let (ino, kind) = self.remove_target(*dir, name, Errno::EISDIR).await?;
                if is_dir(kind) {
                    return Err(Errno::EISDIR.into());
                }
                self.remove(call, *dir, name, (ino, kind), now).await
            }
            MetaOp::Rmdir { dir, name } => {
                match name.as_slice() {
                    b"." => return Err(Errno::EINVAL.into()),
                    b".." => return Err(Errno::ENOTEMPTY.into()),
                    _ => {}
                }
                let (ino, kind) = self.remove_target(*dir, name, Errno::EINVAL).await?;
                if !is_dir(kind) {
                    return Err(Errno::ENOTDIR.into());
                }
                self.remove(call, *dir, name, (ino, kind), now).await
            }
            MetaOp::Rename { dir, name, to_dir, to_name, flags } => {
                self.rename(call, (*dir, name), (*to_dir, to_name), *flags, now, facts).await
            }
            _ => Err(Errno::ENOSYS.into()),
        }
    }

    async fn create(
        &mut self,
        call: &MetaCall,
        dir: Ino,
        name: &Name,
        node: &NewNode,
        hold: bool,
        now: Timestamp,
    ) -> Attempt<Ran> {
        check_name(name)?;
        let parent = self.directory(dir).await?;
        if is_dots(name) || self.lookup(dir, name).await?.is_some() {
            return Err(Errno::EEXIST.into());
        }
        let (mut inode, xattrs) = self.new_inode(&parent, node, now).await?;
        let links = i32::from(inode.is_dir());
        if inode.is_dir() {
            if parent.nlink >= LINKS_MAX {
                return Err(Errno::EMLINK.into());
            }
            let home = placement(&self.config.name_key, name, self.config.shards);
            if dir == self.config.root && home != self.shard {
                let (name, kind, replaces) = (name.clone(), FileKind::Directory, None);
                let insert = Action::Insert { dir, name, ino: None, kind, replaces, links, now };
                let make = Action::MakeDir { inode: Box::new(inode), xattrs };
                return self.run(call, vec![(self.shard, insert), (home, make)]).await;
            }
        }
        inode.ino = self.next_ino()?;
        self.add_inode(&inode, &xattrs);
        self.put_entry(dir, name, inode.ino, inode.kind).await?;
        self.names_changed(dir, links, 1, now).await?;
        let session = call.id.session;
        let attr = inode.attr(self.config.policy);
        Ok(Ran::Reply(if hold { self.opened_reply(&inode, session) } else { entry_reply(attr) }))
    }

    /// Whoever makes a file and has it open is about to write it: the write lease, which nobody
    /// else can have, comes with the hold.
    fn opened_reply(&mut self, inode: &Inode, session: SessionId) -> MetaReply {
        self.add_hold(inode.ino, session);
        let write = inode.kind == FileKind::File;
        if write {
            self.add_lease(inode.ino, session);
        }
        let grant = Grant { read_ms: 0, write };
        MetaReply::Entry(Entry { attr: inode.attr(self.config.policy), grant, dir_grant: Grant::default() })
    }

    async fn remove_target(&self, dir: Ino, name: &Name, dots: Errno) -> Attempt<(Ino, FileKind)> {
        check_name(name)?;
        self.directory(dir).await?;
        if is_dots(name) {
            return Err(dots.into());
        }
        Ok(found(self.lookup(dir, name).await?.ok_or(Errno::ENOENT)?))
    }

    async fn remove(
        &mut self,
        call: &MetaCall,
        dir: Ino,
        name: &Name,
        (ino, kind): (Ino, FileKind),
        now: Timestamp,
    ) -> Attempt<Ran> {
        let links = -i32::from(is_dir(kind));
        let remove = Action::Remove { dir, name: name.clone(), ino, kind, links, now };
        self.run(call, vec![(self.shard, remove), (ino.shard(), Action::DropLink { ino, now })]).await
    }

    async fn rename(
        &mut self,
        call: &MetaCall,
        (dir, name): (Ino, &Name),
        (to_dir, to_name): (Ino, &Name),
        flags: u32,
        now: Timestamp,
        facts: &Facts,
    ) -> Attempt<Ran> {
        let exchange = flags & RENAME_EXCHANGE != 0;
        let no_replace = flags & RENAME_NOREPLACE != 0;
        if flags & !(RENAME_EXCHANGE | RENAME_NOREPLACE) != 0 || (exchange && no_replace) {
            return Err(Errno::EINVAL.into());
        }
        check_name(name)?;
        check_name(to_name)?;
        self.directory(dir).await?;
        if to_dir.shard() == self.shard {
            self.directory(to_dir).await?;
        }
        if is_dots(name) || is_dots(to_name) {
            return Err(Errno::EBUSY.into());
        }
        let source = found(self.lookup(dir, name).await?.ok_or(Errno::ENOENT)?);
        let target = self.rename_target(to_dir, to_name, facts).await?;
        match target {
            None if exchange => return Err(Errno::ENOENT.into()),
            Some(_) if no_replace => return Err(Errno::EEXIST.into()),
            // Two names of one inode, or one name: nothing to do.
            Some(target) if target.0 == source.0 => return Ok(Ran::Reply(MetaReply::Done)),
            _ => {}
        }
        let rename = Rename { dir, name, to_dir, to_name, exchange, source, target };
        let mut plan = rename.plan(now);
        self.guard_against_cycles(&rename, &mut plan, facts).await?;
        if let Some((_, kind)) = target.filter(|_| !exchange) {
            match (is_dir(source.1), is_dir(kind)) {
                (true, false) => return Err(Errno::ENOTDIR.into()),
                (false, true) => return Err(Errno::EISDIR.into()),
                _ => {}
            }
        }
        self.run(call, plan).await
    }

    async fn rename_target(&self, dir: Ino, name: &Name, facts: &Facts) -> Attempt<Option<(Ino, FileKind)>> {
        if dir.shard() == self.shard {
            return Ok(self.lookup(dir, name).await?.map(found));
        }
        match facts.target {
            Some(target) => Ok(target),
            None => Err(Fail::Need(Box::new(Reply::NeedTarget { dir, name: name.clone() }))),
        }
    }

    /// A directory that changes its parent must not end up beneath itself. In one shard that
    /// has the whole chain (and the rename lock) the walk is part of the entry; else the leader
    /// walks under the rename lock, which the transaction then keeps.
    async fn guard_against_cycles(
        &self,
        rename: &Rename<'_>,
        plan: &mut Vec<(ShardId, Action)>,
        facts: &Facts,
    ) -> Attempt<()> {
        let walks = rename.walks();
        if walks.is_empty() {
            return Ok(());
        }
        let home = self.config.root.shard();
        if let Some(token) = facts.rename_token {
            plan.push((home, Action::HoldRenameLock { token }));
            return Ok(());
        }
        let local = home == self.shard && plan.iter().all(|(shard, _)| *shard == self.shard);
        let need = || Fail::Need(Box::new(Reply::NeedRenameLock { walks: walks.clone() }));
        let lock: Option<RenameLockRecord> = self.get(&keys::rename_lock(self.shard)).await?;
        if !local || lock.is_some_and(|lock| lock.holder.is_some()) {
            return Err(need());
        }
        for walk in &walks {
            if !self.walk(walk).await? {
                return Err(need());
            }
        }
        Ok(())
    }

    /// False when the chain leaves this shard before the root.
    async fn walk(&self, walk: &AncestorWalk) -> Attempt<bool> {
        let mut at = walk.from;
        for _ in 0..DEPTH_MAX {
            if at == walk.avoid {
                return Err(walk.errno.into());
            }
            if at == self.config.root {
                return Ok(true);
            }
            if at.shard() != self.shard {
                return Ok(false);
            }
            at = self.directory(at).await?.parent.ok_or(Errno::EIO)?;
        }
        Err(Errno::ELOOP.into())
    }

    /// Carries a plan out if all of it is in this shard, else begins a transaction.
    async fn run(&mut self, call: &MetaCall, mut plan: Vec<(ShardId, Action)>) -> Attempt<Ran> {
        if plan.iter().any(|(shard, _)| *shard != self.shard) {
            return Ok(Ran::Begun(self.begin(call, plan).await?));
        }
        let mut answers = Vec::with_capacity(plan.len());
        for (_, action) in &mut plan {
            answers.push(self.check(action).await?.answer);
        }
        for (_, action) in &plan {
            self.carry_out(action, &answers).await?;
        }
        Ok(Ran::Reply(reply_of(&call.op, &answers)))
    }

    pub(crate) async fn take_rename_lock(&mut self, holder: cfs_wire::RequestId, steal: bool) -> Attempt<Option<u64>> {
        let key = keys::rename_lock(self.shard);
        let stored: Option<RenameLockRecord> = self.get(&key).await?;
        match stored.and_then(|lock| Some((lock.token, lock.holder?))) {
            Some((token, by)) if by == holder => return Ok(Some(token)),
            Some(_) if !steal => return Ok(None),
            // An undecided rename still relies on it, whatever became of its driver.
            _ if self.exists(&keys::locked_rename_lock(self.shard)).await? => return Ok(None),
            _ => {}
        }
        let token = self.next_token();
        self.put(key, &RenameLockRecord { token, holder: Some(holder) });
        Ok(Some(token))
    }

    pub(crate) async fn release_rename_lock(&mut self, token: u64) -> Attempt<()> {
        self.unlocked(&keys::locked_rename_lock(self.shard)).await?;
        let key = keys::rename_lock(self.shard);
        match self.get::<RenameLockRecord>(&key).await? {
            Some(lock) if lock.token == token => self.put(key, &RenameLockRecord { token, holder: None }),
            _ => {}
        }
        Ok(())
    }
}

impl Rename<'_> {
    fn crosses(&self) -> bool {
        self.dir != self.to_dir
    }

    fn plan(&self, now: Timestamp) -> Vec<(ShardId, Action)> {
        let Rename { dir, to_dir, source, target, .. } = *self;
        let (name, to_name) = (self.name.clone(), self.to_name.clone());
        let came = i32::from(self.crosses() && is_dir(source.1));
        let gone = i32::from(target.is_some_and(|(_, kind)| is_dir(kind)));
        let moved = |ino: Ino, parent: Ino| (ino.shard(), Action::Moved { ino, parent: Some(parent), now });
        let insert = |links| Action::Insert {
            dir: to_dir,
            name: to_name,
            ino: Some(source.0),
            kind: source.1,
            replaces: target,
            links,
            now,
        };
        let mut plan = Vec::new();
        match target.filter(|_| self.exchange) {
            Some((ino, kind)) => {
                let left = if self.crosses() { gone - came } else { 0 };
                let back = Action::Insert { dir, name, ino: Some(ino), kind, replaces: Some(source), links: left, now };
                plan.push((dir.shard(), back));
                plan.push((to_dir.shard(), insert(-left)));
                plan.push(moved(ino, dir));
            }
            None => {
                let remove = Action::Remove { dir, name, ino: source.0, kind: source.1, links: -came, now };
                if let Some((ino, _)) = target {
                    plan.push((ino.shard(), Action::DropLink { ino, now }));
                }
                plan.push((to_dir.shard(), insert(came - gone)));
                plan.push((dir.shard(), remove));
            }
        }
        plan.push(moved(source.0, to_dir));
        plan
    }

    /// Which chains of ancestors must not meet which directory. (That a replaced directory is
    /// no ancestor of the source follows from its being empty.)
    fn walks(&self) -> Vec<AncestorWalk> {
        let mut walks = Vec::new();
        if self.crosses() && is_dir(self.source.1) {
            walks.push(AncestorWalk { from: self.to_dir, avoid: self.source.0, errno: Errno::EINVAL });
        }
        let back = self.target.filter(|(_, kind)| self.crosses() && self.exchange && is_dir(*kind));
        if let Some((ino, _)) = back {
            walks.push(AncestorWalk { from: self.dir, avoid: ino, errno: Errno::EINVAL });
        }
        walks
    }
}
