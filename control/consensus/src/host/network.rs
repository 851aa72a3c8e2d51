//! openraft's network over the fabric. Connections belong to the node and are shared by all of
//! its groups.

use super::applier::SnapshotData;
use super::machine::SnapshotSource;
use super::rpc::{
    self, AppendCall, AppendReply, Counted, SnapshotBegin, SnapshotReply, Status, Transfer, TransferLeaderCall,
    TransferLeaderReply, VoteCall, VoteReply,
};
use crate::types::{Member, Raft, Vote};
use bytes::Bytes;
use cfs_fabric::{Address, Connection, Fabric, FabricError, Message};
use cfs_reactor::Handle;
use cfs_wire::ShardId;
use futures_util::future::{Either, select};
use openraft::OptionalSend;
use openraft::errors::{NetworkError, RPCError, ReplicationClosed, StreamingError, Timeout, Unreachable};
use openraft::network::{RPCOption, RPCTypes, RaftNetworkFactory, RaftNetworkV2};
use openraft::type_config::alias::SnapshotOf;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::future::Future;
use std::pin::pin;
use std::rc::Rc;
use std::time::Duration;

/// One chunk of a snapshot, durable or not, is taken in well within this.
const CHUNK_TIMEOUT: Duration = Duration::from_secs(10);
/// Replacing the state may write all of it again.
const FINISH_TIMEOUT: Duration = Duration::from_secs(120);

/// The node's connections to its peers.
pub(super) struct Peers {
    fabric: Rc<dyn Fabric>,
    pub handle: Handle,
    connections: RefCell<BTreeMap<Address, Rc<dyn Connection>>>,
}

impl Peers {
    pub fn new(fabric: Rc<dyn Fabric>, handle: Handle) -> Rc<Peers> {
        Rc::new(Peers { fabric, handle, connections: RefCell::new(BTreeMap::new()) })
    }

    async fn call(&self, address: &Address, request: Message) -> Result<Message, FabricError> {
        let known = self.connections.borrow().get(address).filter(|known| !known.is_closed()).cloned();
        let connection = match known {
            Some(connection) => connection,
            None => {
                let connection = self.fabric.connect(address).await?;
                self.connections.borrow_mut().insert(address.clone(), connection.clone());
                connection
            }
        };
        connection.call(request).await
    }
}

/// Makes the network of one group.
pub(super) struct GroupNetwork {
    pub peers: Rc<Peers>,
    pub group: ShardId,
    pub node: u64,
}

impl RaftNetworkFactory<Raft> for GroupNetwork {
    type Network = PeerNetwork;

    async fn new_client(&mut self, target: u64, member: &Member) -> PeerNetwork {
        PeerNetwork {
            peers: self.peers.clone(),
            group: self.group,
            node: self.node,
            target,
            address: Address(member.address.clone()),
        }
    }
}

/// One group's way to one peer.
pub(super) struct PeerNetwork {
    peers: Rc<Peers>,
    group: ShardId,
    node: u64,
    target: u64,
    address: Address,
}

impl PeerNetwork {
    async fn call<Q: Serialize, R: DeserializeOwned + Counted>(
        &self,
        action: RPCTypes,
        request: (u16, &Q, Bytes),
        within: Duration,
    ) -> Result<R, RPCError<Raft>> {
        let (opcode, body, bulk) = request;
        let message = rpc::request(opcode, self.group.0, body, bulk);
        let reply = match self.peers.handle.timeout(within, self.peers.call(&self.address, message)).await {
            Some(Ok(reply)) => reply,
            // Who can't be connected to is left alone for a while; a lost connection is not.
            Some(Err(error @ FabricError::Lost { .. })) => return Err(NetworkError::new(&error).into()),
            Some(Err(error)) => return Err(Unreachable::new(&error).into()),
            None => {
                let timeout = Timeout { action, id: self.node, target: self.target, timeout: within };
                return Err(timeout.into());
            }
        };
        rpc::read_reply(&reply).map_err(|status: Status| Unreachable::new(&status).into())
    }

    async fn send_snapshot(
        &self,
        begin: SnapshotBegin,
        mut source: Box<dyn SnapshotSource>,
    ) -> Result<SnapshotReply, StreamingError<Raft>> {
        let action = RPCTypes::InstallSnapshot;
        let id: u64 = self.call(action, (rpc::SNAPSHOT_BEGIN, &begin, Bytes::new()), CHUNK_TIMEOUT).await?;
        let mut number = 0;
        loop {
            let chunk = source.next().await;
            let chunk = chunk.map_err(|error| openraft::StorageError::read_snapshot(None, source_error(&error)))?;
            let Some(chunk) = chunk else { break };
            let transfer = Transfer { id, number };
            let () = self.call(action, (rpc::SNAPSHOT_CHUNK, &transfer, chunk), CHUNK_TIMEOUT).await?;
            number += 1;
        }
        let transfer = Transfer { id, number };
        Ok(self.call(action, (rpc::SNAPSHOT_FINISH, &transfer, Bytes::new()), FINISH_TIMEOUT).await?)
    }
}

fn source_error(error: &super::machine::StateError) -> openraft::type_config::alias::ErrorSourceOf<Raft> {
    <openraft::type_config::alias::ErrorSourceOf<Raft> as openraft::errors::ErrorSource>::from_error(error)
}

impl RaftNetworkV2<Raft> for PeerNetwork {
    type SnapshotData = SnapshotData;

    async fn append_entries(&mut self, request: AppendCall, option: RPCOption) -> Result<AppendReply, RPCError<Raft>> {
        self.call(RPCTypes::AppendEntries, (rpc::APPEND, &request, Bytes::new()), option.hard_ttl()).await
    }

    async fn vote(&mut self, request: VoteCall, option: RPCOption) -> Result<VoteReply, RPCError<Raft>> {
        self.call(RPCTypes::Vote, (rpc::VOTE, &request, Bytes::new()), option.hard_ttl()).await
    }

    async fn pre_vote(&mut self, request: VoteCall, option: RPCOption) -> Result<VoteReply, RPCError<Raft>> {
        self.call(RPCTypes::Vote, (rpc::PRE_VOTE, &request, Bytes::new()), option.hard_ttl()).await
    }

    async fn transfer_leader(
        &mut self,
        request: TransferLeaderCall,
        option: RPCOption,
    ) -> Result<TransferLeaderReply, RPCError<Raft>> {
        self.call(RPCTypes::TransferLeader, (rpc::TRANSFER_LEADER, &request, Bytes::new()), option.hard_ttl()).await
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: SnapshotOf<Raft, SnapshotData>,
        cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        _option: RPCOption,
    ) -> Result<SnapshotReply, StreamingError<Raft>> {
        let SnapshotData::Source(source) = snapshot.snapshot else {
            return Err(Unreachable::from_string("this snapshot has no content to send").into());
        };
        let send = pin!(self.send_snapshot(SnapshotBegin { vote, meta: snapshot.meta }, source));
        match select(pin!(cancel), send).await {
            Either::Left((closed, _)) => Err(closed.into()),
            Either::Right((sent, _)) => sent,
        }
    }
}
