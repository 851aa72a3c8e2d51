//! Calls that survive lost replies, restarts of the server and fenced sessions.
//!
//! A change keeps its request id over all attempts, so that the server answers a repetition from
//! the stored reply. A change whose session was fenced is done again in the next session only if
//! it was certainly not executed.

use crate::link::LinkError;
use crate::session::Session;
use crate::stamps::Stamp;
use crate::{Client, ConnectError};
use bytes::Bytes;
use cfs_reactor::Instant;
use cfs_wire::meta::{MetaCall, MetaError, MetaOp, MetaReply, MetaResult, MountCall, MountResult, OP_META, OP_MOUNT};
use cfs_wire::{Errno, ShardId, body};
use std::rc::Rc;
use std::time::Duration;

/// The first pause before a repetition; it doubles up to [`PAUSE_MAX`].
const PAUSE_MIN: Duration = Duration::from_millis(5);
/// A server that restarts is noticed within this.
const PAUSE_MAX: Duration = Duration::from_millis(500);

/// A reply, with what its grants count from.
pub(crate) struct Answer {
    pub reply: MetaReply,
    pub session: Rc<Session>,
    /// When the attempt that was answered was sent.
    pub sent: Instant,
    /// The order of changes when the call began.
    pub stamp: Stamp,
}

/// Why a change gave no reply.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum CallError {
    Errno(Errno),
    /// A location in it is no longer accepted.
    Stale,
    /// The session is over. `executed`: an earlier attempt may have been carried out.
    Fenced {
        executed: bool,
    },
    /// No answer within the retry window, or none that could be read; it may have been carried out.
    Unanswered,
}

impl CallError {
    /// What the program is told.
    pub fn errno(self) -> Errno {
        match self {
            CallError::Errno(errno) => errno,
            CallError::Stale | CallError::Fenced { .. } | CallError::Unanswered => Errno::EIO,
        }
    }
}

/// Growing pauses between attempts, with a random part so that many clients don't march in step.
pub(crate) struct Backoff {
    pause: Duration,
    window: Duration,
    deadline: Instant,
}

impl Backoff {
    pub fn new(client: &Client) -> Backoff {
        Backoff::of(client, client.config.retry_window)
    }

    /// For a call that may have to wait until another client has written back.
    fn patient(client: &Client) -> Backoff {
        Backoff::of(client, client.config.retry_window * 2)
    }

    fn of(client: &Client, window: Duration) -> Backoff {
        Backoff { pause: PAUSE_MIN, window, deadline: client.handle.now() + window }
    }

    /// Opens the window anew; the pauses stay as they have grown.
    pub fn start_again(&mut self, client: &Client) {
        self.deadline = client.handle.now() + self.window;
    }

    /// False when the window is over.
    pub async fn wait(&mut self, client: &Client) -> bool {
        if client.handle.now() >= self.deadline {
            return false;
        }
        let half = self.pause / 2;
        let jitter = client.handle.random_u64() % (half.as_nanos() as u64).max(1);
        client.handle.sleep(half + Duration::from_nanos(jitter)).await;
        self.pause = (self.pause * 2).min(PAUSE_MAX);
        true
    }
}

impl Client {
    /// A call that changes nothing: repeated in whatever session there is.
    pub(crate) async fn read_call(self: &Rc<Self>, op: MetaOp) -> Result<Answer, Errno> {
        let stamp = self.stamps.begin();
        let mut op = op;
        loop {
            let session = self.session().await?;
            let shard = self.shard_of(&op);
            let mut call = MetaCall { id: session.read_id(), lowest_unacknowledged: 0, shard, op };
            match self.attempts(&session, &mut call, false).await {
                Ok((reply, sent)) => return Ok(Answer { reply, session, sent, stamp }),
                Err(CallError::Fenced { .. }) => op = call.op,
                Err(error) => return Err(error.errno()),
            }
        }
    }

    /// A call that changes something, in the present session or, if it was certainly not
    /// executed, in the next.
    pub(crate) async fn change(self: &Rc<Self>, op: MetaOp) -> Result<Answer, Errno> {
        let mut op = op;
        loop {
            let session = self.session().await?;
            let (outcome, back) = self.change_in(&session, op).await;
            match outcome {
                Err(CallError::Fenced { executed: false }) => op = back,
                Err(error) => return Err(error.errno()),
                Ok(answer) => return Ok(answer),
            }
        }
    }

    /// A change in one session. Gives the operation back for another attempt.
    pub(crate) async fn change_in(
        self: &Rc<Self>,
        session: &Rc<Session>,
        op: MetaOp,
    ) -> (Result<Answer, CallError>, MetaOp) {
        let stamp = self.stamps.begin();
        let urgent = matches!(op, MetaOp::CancelLock { .. });
        let sequence = session.sequence(urgent).await;
        let shard = self.shard_of(&op);
        let mut call = MetaCall { id: sequence.request_id(), lowest_unacknowledged: 0, shard, op };
        let outcome = self.attempts(session, &mut call, true).await;
        if !matches!(outcome, Err(CallError::Unanswered)) {
            sequence.settle();
        }
        let answer = outcome.map(|(reply, sent)| Answer { reply, session: session.clone(), sent, stamp });
        (answer, call.op)
    }

    fn shard_of(&self, op: &MetaOp) -> ShardId {
        op.home().map_or(ShardId(0), |ino| ino.shard())
    }

    async fn attempts(
        self: &Rc<Self>,
        session: &Rc<Session>,
        call: &mut MetaCall,
        changes: bool,
    ) -> Result<(MetaReply, Instant), CallError> {
        let commits = matches!(call.op, MetaOp::Commit(_));
        let mut backoff = if commits { Backoff::new(self) } else { Backoff::patient(self) };
        let (mut executed, mut opened) = (false, false);
        let mut why = String::new();
        // A lock may be waited for as long as it takes.
        let held = matches!(call.op, MetaOp::Lock { wait: true, .. });
        let (link, timeout) =
            if held { (&self.wait_link, self.config.retry_window) } else { (&self.meta, self.config.call_timeout) };
        loop {
            if session.is_fenced() {
                return Err(CallError::Fenced { executed: executed && changes });
            }
            call.lowest_unacknowledged = session.lowest_unacknowledged();
            let encoded = body::encode(call).map_err(|error| {
                tracing::error!(%error, "a request is too large for the wire");
                CallError::Errno(Errno::EIO)
            })?;
            let sent = self.handle.now();
            match link.call(OP_META, encoded, Bytes::new(), timeout).await {
                Ok(message) => match body::decode::<MetaResult>(&message.body) {
                    Ok(Ok(reply)) => return Ok((reply, sent)),
                    Ok(Err(MetaError::Errno(errno))) => return Err(CallError::Errno(errno)),
                    Ok(Err(MetaError::StaleReference)) => return Err(CallError::Stale),
                    Ok(Err(MetaError::Fenced)) => {
                        self.fence(session);
                        return Err(CallError::Fenced { executed: executed && changes });
                    }
                    Ok(Err(MetaError::SessionUnknown)) => {
                        if self.open_session(session, call.shard).await? && !opened {
                            opened = true;
                            continue;
                        }
                    }
                    // It was not carried out; all nodes are behind one address.
                    Ok(Err(error @ MetaError::NotLeader { .. })) => why = error.to_string(),
                    // It may have been.
                    Ok(Err(error @ MetaError::Unavailable(_))) => {
                        executed = true;
                        why = error.to_string();
                    }
                    // Not lost for patience: the server is there and at work.
                    Ok(Err(MetaError::Busy(_))) => backoff.start_again(self),
                    Ok(Err(MetaError::Malformed(detail))) => {
                        tracing::error!(detail, "the server does not understand a request");
                        return Err(CallError::Errno(Errno::EIO));
                    }
                    Err(error) => {
                        tracing::error!(%error, "the server's answer is malformed");
                        return Err(CallError::Unanswered);
                    }
                },
                Err(LinkError::Unanswered(detail)) => {
                    executed = true;
                    why = detail;
                    if held && self.handle.now() - sent >= timeout {
                        backoff = Backoff::patient(self);
                    }
                    if cfs_wire::planted::is(cfs_wire::planted::Bug::ClientRenumberRetry) && changes {
                        call.id = session.sequence(true).await.request_id();
                    }
                }
                Err(LinkError::Refused(error)) => {
                    tracing::error!(%error, "a call cannot be sent");
                    return Err(if executed { CallError::Unanswered } else { CallError::Errno(Errno::EIO) });
                }
            }
            if !backoff.wait(self).await {
                let waited = backoff.window;
                tracing::error!(?waited, why, shard = %call.shard, "the server does not answer: a program gets EIO");
                return Err(CallError::Unanswered);
            }
        }
    }

    /// Makes a shard know the session. False if it has to be asked again later.
    async fn open_session(self: &Rc<Self>, session: &Rc<Session>, shard: ShardId) -> Result<bool, CallError> {
        let sequence = session.sequence(true).await;
        let op = MetaOp::OpenSession { client: self.config.name.clone() };
        let lowest_unacknowledged = session.lowest_unacknowledged();
        let call = MetaCall { id: sequence.request_id(), lowest_unacknowledged, shard, op };
        let Ok(encoded) = body::encode(&call) else { return Err(CallError::Errno(Errno::EIO)) };
        // Carried out late it changes nothing.
        sequence.settle();
        let Ok(message) = self.meta.call(OP_META, encoded, Bytes::new(), self.config.call_timeout).await else {
            return Ok(false);
        };
        match body::decode::<MetaResult>(&message.body) {
            Ok(Ok(_)) => {
                session.set_known(shard);
                Ok(true)
            }
            Ok(Err(MetaError::Fenced)) => {
                self.fence(session);
                Err(CallError::Fenced { executed: false })
            }
            Ok(Err(MetaError::Errno(errno))) => Err(CallError::Errno(errno)),
            Ok(Err(_)) => Ok(false),
            Err(error) => {
                tracing::error!(%error, "the server's answer is malformed");
                Err(CallError::Errno(Errno::EIO))
            }
        }
    }

    /// Ends the session in one shard. Without an answer it ends there by itself.
    pub(crate) async fn close_session(self: &Rc<Self>, session: &Rc<Session>, shard: ShardId) {
        let sequence = session.sequence(true).await;
        let op = MetaOp::CloseSession;
        let mut call = MetaCall { id: sequence.request_id(), lowest_unacknowledged: 0, shard, op };
        if let Err(error) = self.attempts(session, &mut call, true).await {
            tracing::debug!(%shard, ?error, "the session could not be closed");
        }
    }

    /// The present session, or the next one once it is there.
    pub(crate) async fn session(self: &Rc<Self>) -> Result<Rc<Session>, Errno> {
        let deadline = self.handle.now() + self.config.retry_window;
        loop {
            let replaced = self.session_replaced.notified();
            let session = self.session.borrow().clone();
            if !session.is_fenced() {
                return Ok(session);
            }
            let left = deadline - self.handle.now();
            if left.is_zero() || self.handle.timeout(left, replaced).await.is_none() {
                return Err(Errno::EIO);
            }
        }
    }
}

/// Why an attempt gave no session.
pub(crate) enum NotMounted {
    /// Another may.
    Unanswered(String),
    /// None will.
    Refused(ConnectError),
}

/// One attempt to get a session.
pub(crate) async fn mount(
    link: &crate::link::Link,
    handle: &cfs_reactor::Handle,
    config: &crate::ClientConfig,
) -> Result<Rc<Session>, NotMounted> {
    let refused = |detail| NotMounted::Refused(ConnectError::Refused { address: link.address().clone(), detail });
    let call = MountCall { client: config.name.clone() };
    let encoded = body::encode(&call).map_err(|error| refused(error.to_string()))?;
    let sent = handle.now();
    let message = match link.call(OP_MOUNT, encoded, Bytes::new(), config.call_timeout).await {
        Ok(message) => message,
        Err(LinkError::Unanswered(detail)) => return Err(NotMounted::Unanswered(detail)),
        Err(LinkError::Refused(error)) => return Err(NotMounted::Refused(error.into())),
    };
    match body::decode::<MountResult>(&message.body) {
        Ok(Ok(reply)) => Ok(Session::new(handle, &reply, sent)),
        Ok(Err(error @ (MetaError::Unavailable(_) | MetaError::NotLeader { .. }))) => {
            Err(NotMounted::Unanswered(error.to_string()))
        }
        Ok(Err(error)) => Err(refused(error.to_string())),
        Err(error) => Err(refused(format!("the server's answer is malformed: {error}"))),
    }
}
