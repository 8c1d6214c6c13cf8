//! `imagemirror probe`: asks an operator what it says of itself, until it is Ready or the time is over. For `helm test`: the
//! image has no other program. Plain HTTP, as probes are served.

use std::{
    io::{Read as _, Write as _},
    net::{TcpStream, ToSocketAddrs as _},
    thread::sleep,
    time::{Duration, Instant},
};

use clap::Args;

use super::Failure;
use crate::api::parse_duration;

/// Between two questions, and how long one may take.
const PAUSE: Duration = Duration::from_millis(500);
const ANSWER: Duration = Duration::from_secs(5);
/// No answer of ours is longer.
const MAX_BODY: u64 = 64 << 10;

#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// `http://HOST:PORT/readyz`.
    url: String,
    /// How long to ask.
    #[arg(long, default_value = "60s", value_parser = |text: &str| parse_duration(text).ok_or("write for example 30s"))]
    timeout: Duration,
}

pub(super) fn run(arguments: &Arguments) -> Result<(), Failure> {
    let address = arguments.url.strip_prefix("http://").and_then(|rest| rest.split_once('/'));
    let (host, path) = address.ok_or_else(|| Failure::Usage("write http://HOST:PORT/readyz".to_owned()))?;
    let deadline = Instant::now() + arguments.timeout;
    loop {
        let why = match ask(host, path) {
            Ok((true, body)) => {
                print!("{body}");
                return Ok(());
            }
            Ok((false, body)) => body.trim().to_owned(),
            Err(error) => error.to_string(),
        };
        if Instant::now() >= deadline {
            return Err(Failure::Failed(format!("{} is not ready: {why}", arguments.url)));
        }
        sleep(PAUSE);
    }
}

/// Whether the answer is 200, and its body.
fn ask(host: &str, path: &str) -> std::io::Result<(bool, String)> {
    let unknown = || std::io::Error::other("the name has no address");
    let address = host.to_socket_addrs()?.next().ok_or_else(unknown)?;
    let mut stream = TcpStream::connect_timeout(&address, ANSWER)?;
    stream.set_read_timeout(Some(ANSWER))?;
    write!(stream, "GET /{path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.take(MAX_BODY).read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    Ok((head.split(' ').nth(1) == Some("200"), body.to_owned()))
}
