//! An HTTP proxy that opens tunnels (RFC 9110, section 9.3.6, CONNECT), asks for a login if it has one, and remembers where
//! it was asked to go.
//!
//! It lives in the test's process; dropping it closes everything.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, bail};
use base64::Engine as _;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinHandle, JoinSet};

/// A running proxy.
pub struct Tunnel {
    address: SocketAddr,
    state: Arc<State>,
    task: JoinHandle<()>,
}

#[derive(Default)]
struct State {
    /// The value that `Proxy-Authorization` must have.
    authorization: Option<String>,
    opened: Mutex<Vec<String>>,
    refused: Mutex<usize>,
}

impl Tunnel {
    /// One that wants this name and password, or lets everybody through.
    pub async fn start(login: Option<(&str, &str)>) -> Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.context("listen")?;
        let address = listener.local_addr()?;
        let encode = |(user, password)| {
            let text = base64::engine::general_purpose::STANDARD.encode(format!("{user}:{password}"));
            format!("Basic {text}")
        };
        let state = Arc::new(State { authorization: login.map(encode), ..State::default() });
        let shared = Arc::clone(&state);
        let task = tokio::spawn(async move {
            // Dropped with this task, and its connections with it.
            let mut connections = JoinSet::new();
            loop {
                while connections.try_join_next().is_some() {}
                let Ok((client, _)) = listener.accept().await else { continue };
                let state = Arc::clone(&shared);
                connections.spawn(async move { serve(client, &state).await });
            }
        });
        Ok(Self { address, state, task })
    }

    /// `http://127.0.0.1:PORT`.
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Where tunnels were opened to.
    #[must_use]
    pub fn opened(&self) -> Vec<String> {
        self.state.opened.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Who came without the login, or with another one.
    #[must_use]
    pub fn refused(&self) -> usize {
        *self.state.refused.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Tunnel {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn serve(client: TcpStream, state: &State) -> Result<()> {
    let mut client = BufReader::new(client);
    let mut head = Vec::new();
    loop {
        let mut line = String::new();
        if client.read_line(&mut line).await? == 0 {
            bail!("it ended in its head");
        }
        if line == "\r\n" {
            break;
        }
        head.push(line.trim_end().to_owned());
    }
    let given = head.iter().find_map(|line| {
        let (name, value) = line.split_once(": ")?;
        name.eq_ignore_ascii_case("proxy-authorization").then_some(value)
    });
    if state.authorization.is_some() && given != state.authorization.as_deref() {
        *state.refused.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        let answer =
            "HTTP/1.1 407 Proxy Authentication Required\r\nProxy-Authenticate: Basic\r\nContent-Length: 0\r\n\r\n";
        client.write_all(answer.as_bytes()).await?;
        return Ok(());
    }
    let mut words = head.first().map(String::as_str).unwrap_or_default().split(' ');
    let (Some("CONNECT"), Some(target)) = (words.next(), words.next()) else { bail!("not a CONNECT") };
    let mut upstream = TcpStream::connect(target).await?;
    state.opened.lock().unwrap_or_else(PoisonError::into_inner).push(target.to_owned());
    client.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await?;
    tokio::io::copy_bidirectional(&mut client, &mut upstream).await?;
    Ok(())
}
