//! The store over TCP: one server, a client a rank. The server is asynchronous, so that thousands of clients may wait.
//!
//! Every client proves the shared token before anything else that it sends is parsed.

mod client;
mod server;
mod wire;

pub use client::TcpStore;
pub use server::TcpStoreServer;
