//! One connection to one address, made again when it is lost. It never repeats a call: that
//! needs a request id, which is the caller's.

use bytes::Bytes;
use cfs_fabric::{Address, Connection, Fabric, FabricError, Message};
use cfs_reactor::Handle;
use cfs_reactor::sync::Semaphore;
use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

/// Why an attempt gave no reply.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub(crate) enum LinkError {
    /// It may have been executed; it may be repeated. With the reason.
    #[error("{0}")]
    Unanswered(String),
    /// It can never succeed.
    #[error(transparent)]
    Refused(FabricError),
}

pub(crate) struct Link {
    handle: Handle,
    fabric: Rc<dyn Fabric>,
    address: Address,
    connection: RefCell<Option<Rc<dyn Connection>>>,
    /// One connects, the others wait for it.
    connecting: Rc<Semaphore>,
}

impl Link {
    pub fn new(handle: &Handle, fabric: &Rc<dyn Fabric>, address: &Address) -> Link {
        Link {
            handle: handle.clone(),
            fabric: fabric.clone(),
            address: address.clone(),
            connection: RefCell::new(None),
            connecting: Semaphore::new(1),
        }
    }

    pub fn address(&self) -> &Address {
        &self.address
    }

    /// One attempt of one call.
    pub async fn call(&self, opcode: u16, body: Bytes, bulk: Bytes, timeout: Duration) -> Result<Message, LinkError> {
        self.attempt(Message { opcode, body, bulk }, 0, timeout).await
    }

    /// The same for so many bulk bytes.
    pub async fn call_for(
        &self,
        opcode: u16,
        body: Bytes,
        length: usize,
        timeout: Duration,
    ) -> Result<Message, LinkError> {
        self.attempt(Message { opcode, body, bulk: Bytes::new() }, length, timeout).await
    }

    async fn attempt(&self, request: Message, room: usize, timeout: Duration) -> Result<Message, LinkError> {
        let used = RefCell::new(None);
        let attempt = async {
            let connection = self.connection().await?;
            used.replace(Some(connection.clone()));
            let answer = connection.call_with_room(request, room).await;
            if answer.is_err() && connection.is_closed() {
                self.forget(&connection);
            }
            answer
        };
        match self.handle.timeout(timeout, attempt).await {
            Some(Ok(message)) => Ok(message),
            Some(Err(error)) if error.is_retryable() => Err(LinkError::Unanswered(error.to_string())),
            Some(Err(error)) => Err(LinkError::Refused(error)),
            None => {
                // A connection that lost its peer without a word stays silent for ever. Others may have
                // replaced it already.
                if let Some(connection) = used.take() {
                    self.forget(&connection);
                }
                Err(LinkError::Unanswered(format!("{} does not answer within {timeout:?}", self.address)))
            }
        }
    }

    async fn connection(&self) -> Result<Rc<dyn Connection>, FabricError> {
        if let Some(connection) = self.open_connection() {
            return Ok(connection);
        }
        let _turn = self.connecting.acquire(1).await;
        if let Some(connection) = self.open_connection() {
            return Ok(connection);
        }
        let connection = self.fabric.connect(&self.address).await?;
        *self.connection.borrow_mut() = Some(connection.clone());
        Ok(connection)
    }

    fn open_connection(&self) -> Option<Rc<dyn Connection>> {
        self.connection.borrow().as_ref().filter(|connection| !connection.is_closed()).cloned()
    }

    fn forget(&self, connection: &Rc<dyn Connection>) {
        let mut current = self.connection.borrow_mut();
        if current.as_ref().is_some_and(|current| Rc::ptr_eq(current, connection)) {
            current.take();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cfs_fabric::{Listener, Service};
    use cfs_reactor::Executor;
    use cfs_reactor::clock::SimClock;
    use futures_util::FutureExt as _;
    use futures_util::future::LocalBoxFuture;
    use std::cell::Cell;

    /// Connects at once; nobody ever answers.
    #[derive(Default)]
    struct Silent {
        connections: Cell<u32>,
    }

    struct SilentConnection;

    impl Fabric for Silent {
        fn listen(&self, address: &Address, _service: Rc<dyn Service>) -> Result<Box<dyn Listener>, FabricError> {
            Err(FabricError::Listen { address: address.clone(), detail: "nobody listens".to_owned() })
        }

        fn connect(&self, _address: &Address) -> LocalBoxFuture<'_, Result<Rc<dyn Connection>, FabricError>> {
            self.connections.set(self.connections.get() + 1);
            async { Ok(Rc::new(SilentConnection) as Rc<dyn Connection>) }.boxed_local()
        }
    }

    impl Connection for SilentConnection {
        fn call(&self, _request: Message) -> LocalBoxFuture<'_, Result<Message, FabricError>> {
            std::future::pending().boxed_local()
        }

        fn is_closed(&self) -> bool {
            false
        }

        fn peer_address(&self) -> Address {
            Address("nobody".to_owned())
        }

        fn carrier(&self) -> String {
            "nothing".to_owned()
        }
    }

    #[test]
    fn a_call_that_times_out_gives_up_its_own_connection_and_no_other() {
        let executor = Executor::new(Rc::new(SimClock::new(1)));
        let handle = executor.domain();
        let fabric = Rc::new(Silent::default());
        let link = Rc::new(Link::new(&handle, &(fabric.clone() as Rc<dyn Fabric>), &Address("nobody".to_owned())));
        let clock = handle.clone();
        let story = async move {
            // At 0, 5 and 11 s, each for 10 s: the third is made when the first has given up what it
            // shared with the second, and goes on when that one gives up too. So does the fourth.
            let calls = [0, 5, 11, 16].map(|second| {
                let (link, clock) = (link.clone(), clock.clone());
                clock.clone().spawn(async move {
                    clock.sleep(Duration::from_secs(second)).await;
                    link.call(1, Bytes::new(), Bytes::new(), Duration::from_secs(10)).await
                })
            });
            for call in calls {
                assert!(matches!(call.await.unwrap(), Err(LinkError::Unanswered(_))));
            }
            assert_eq!(fabric.connections.get(), 2);
        };
        executor.run_simulated(&handle, story).unwrap().unwrap();
    }
}
