//! Pages of open files that others (the kernel) keep and programs use without asking: mapped, and by
//! splice. What was granted for them is renewed for as long as the file is open, and where that fails
//! they are dropped before it ends.

use crate::Client;
use crate::files::OpenFile;
use crate::inode::Inode;
use bytes::Bytes;
use cfs_wire::limits::RENEWALS_MAX;
use cfs_wire::meta::{MetaOp, MetaReply};
use cfs_wire::{Errno, Ino, ShardId};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

/// How often the grants of open files are looked at.
const TICK: Duration = Duration::from_millis(200);
/// How often pages are read again that another client changes meanwhile.
const GRANTED_READS_MAX: u32 = 3;

/// What the pages of an open file need.
enum Need {
    Nothing,
    /// The grant comes to its end.
    Renewal,
    /// It ends before a renewal can be answered.
    Dropping,
    /// All were read since the last time they were dropped: they are current once there is a grant.
    Settling,
}

impl Client {
    pub(crate) fn spawn_page_care(self: &Rc<Self>) {
        let client = self.clone();
        self.handle.spawn(async move {
            while !client.closed.get() {
                let wanted = client.page_care_wanted.notified();
                if client.open_inodes.borrow().is_empty() || client.invalidator.borrow().is_none() {
                    wanted.await;
                    continue;
                }
                client.handle.sleep(TICK).await;
                client.care_for_pages();
            }
        });
    }

    fn care_for_pages(self: &Rc<Self>) {
        if self.invalidator.borrow().is_none() || self.session.borrow().is_fenced() {
            return;
        }
        let open: Vec<Ino> = self.open_inodes.borrow().iter().copied().collect();
        let mut due: BTreeMap<ShardId, Vec<Ino>> = BTreeMap::new();
        for inode in open.into_iter().filter_map(|ino| self.known_inode(ino)) {
            let ino = inode.ino;
            match self.need_of_pages(&inode) {
                Need::Nothing => {}
                Need::Renewal => due.entry(ino.shard()).or_default().push(ino),
                Need::Dropping => {
                    inode.state().pages_version = None;
                    inode.state().pages_read = false;
                    let client = self.clone();
                    self.handle.spawn(async move { client.tell_invalidator(ino, false).await });
                }
                Need::Settling => {
                    inode.state().settling = true;
                    let client = self.clone();
                    self.handle.spawn(async move {
                        client.settle_pages(&inode).await;
                        inode.state().settling = false;
                    });
                }
            }
        }
        for inos in due.into_values() {
            for some in inos.chunks(RENEWALS_MAX) {
                let (client, inos) = (self.clone(), some.to_vec());
                self.handle.spawn(async move { client.renew(inos).await });
            }
        }
    }

    fn need_of_pages(&self, inode: &Inode) -> Need {
        if self.holds_lease(inode) {
            return Need::Nothing;
        }
        let left = self.cache_left(inode);
        let state = inode.state();
        match state.pages_version {
            // They were not found current before what they were read under ended: nobody would tell of a
            // change from then on.
            None if state.pages_read && left <= state.granted_for / 8 => Need::Dropping,
            None if state.settling || state.pages_unsure() => Need::Nothing,
            None => Need::Settling,
            Some(_) if left > state.granted_for / 2 => Need::Nothing,
            Some(_) if left > state.granted_for / 8 => Need::Renewal,
            Some(_) => Need::Dropping,
        }
    }

    /// Renews grants of inodes of one shard. What is not granted is looked at again at the next tick.
    async fn renew(self: &Rc<Self>, inos: Vec<Ino>) {
        let Ok(answer) = self.read_call(MetaOp::Renew { inos: inos.clone() }).await else { return };
        let MetaReply::Renewed(renewals) = &answer.reply else {
            crate::cache::unexpected(&answer.reply);
            return;
        };
        for (ino, renewal) in inos.into_iter().zip(renewals) {
            let Some(inode) = self.known_inode(ino) else { continue };
            let covered = self.holds_lease(&inode) || inode.state().granted_until > self.now();
            self.take_grant(&inode, renewal.grant, &answer.session, answer.sent, answer.stamp);
            if renewal.grant.read_ms > 0 && self.is_current(&inode, answer.stamp) {
                inode.state().see_version(renewal.version, covered);
            }
        }
    }

    /// Finds pages current that were dropped and have been read under grants since. They are not dropped
    /// another time: the kernel would take attributes for outdated that it is just being answered.
    async fn settle_pages(self: &Rc<Self>, inode: &Rc<Inode>) {
        let Ok(answer) = self.read_call(MetaOp::GetAttr { ino: inode.ino }).await else { return };
        let MetaReply::Attr { attr, grant } = &answer.reply else {
            crate::cache::unexpected(&answer.reply);
            return;
        };
        self.take_attr(attr, *grant, &answer);
        let covered = self.is_current(inode, answer.stamp) && !self.cache_left(inode).is_zero();
        let mut state = inode.state();
        if covered && state.pages_version.is_none() && !state.pages_unsure() {
            state.settle_pages(covered);
        }
    }

    /// Reads for who keeps the bytes as pages that programs use without asking. What another client is
    /// just changing is read again, so that what is kept is granted.
    pub async fn read_for_pages(self: &Rc<Self>, file: &OpenFile, offset: u64, length: u32) -> Result<Bytes, Errno> {
        let inode = &file.inode;
        for _ in 0..GRANTED_READS_MAX {
            let stamp = self.stamps.now();
            let bytes = self.read(file, offset, length).await?;
            inode.state().pages_read = true;
            let granted = !self.cache_left(inode).is_zero() && self.stamps.unchanged_since(inode.ino, stamp);
            if granted || self.holds_lease(inode) {
                return Ok(bytes);
            }
            // For its grant.
            let _ = self.getattr(inode.ino).await;
        }
        let bytes = self.read(file, offset, length).await?;
        inode.state().ungranted_pages = true;
        Ok(bytes)
    }
}
