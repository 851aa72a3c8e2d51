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
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum LinkError {
    /// It may have been executed; it may be repeated. With the reason.
    Unanswered(String),
    /// It can never succeed.
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
        let attempt = async {
            let connection = self.connection().await?;
            let answer = connection.call(Message { opcode, body, bulk }).await;
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
                // A connection that lost its peer without a word stays silent for ever.
                self.connection.borrow_mut().take();
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
