//! The cluster's DNS: `SERVICE.NAMESPACE.svc.cluster.local` is the address of that Service, and nothing else has one. The
//! API server is asked for each name anew.

use std::net::Ipv4Addr;
use std::sync::Arc;

use anyhow::{Context, Result};
use serde_json::Value;
use tokio::net::UdpSocket;
use tokio::task::JoinHandle;

const PORT: u16 = 53;
/// What the names of Services end with.
pub(crate) const DOMAIN: &str = "cluster.local";
/// Type A, class IN.
const ADDRESS_QUESTION: [u8; 4] = [0, 1, 0, 1];
/// The answer's name is that of the question, which begins after the header of 12 bytes; type A, class IN, for 5 seconds,
/// and the length of an address.
const ADDRESS_ANSWER: [u8; 12] = [0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 5, 0, 4];

/// A running server; dropping it stops it.
pub(crate) struct Dns(JoinHandle<()>);

impl Dns {
    /// Listens at `host`. `client` is somebody who may read the Services at `apiserver`.
    pub(crate) async fn start(host: &str, apiserver: &str, client: reqwest::Client) -> Result<Self> {
        let socket = Arc::new(UdpSocket::bind((host, PORT)).await.context("listen for DNS")?);
        let services = format!("{apiserver}/api/v1/namespaces");
        Ok(Self(tokio::spawn(async move {
            let mut buffer = [0; 512];
            loop {
                let Ok((length, peer)) = socket.recv_from(&mut buffer).await else { continue };
                let Some((name, question)) = question(&buffer[..length]) else { continue };
                let address = address(&client, &services, &name).await;
                let _ = socket.send_to(&answer(&buffer[..length], question, address), peer).await;
            }
        })))
    }
}

impl Drop for Dns {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn address(client: &reqwest::Client, services: &str, name: &str) -> Option<Ipv4Addr> {
    let (service, namespace) = name.strip_suffix(&format!(".svc.{DOMAIN}"))?.split_once('.')?;
    let answer = client.get(format!("{services}/{namespace}/services/{service}")).send().await.ok()?;
    let service: Value = serde_json::from_slice(&answer.bytes().await.ok()?).ok()?;
    service["spec"]["clusterIP"].as_str()?.parse().ok()
}

/// The name that a message asks for in small letters, and the bytes of the question (RFC 1035, 4.1.2).
fn question(message: &[u8]) -> Option<(String, &[u8])> {
    let mut labels = Vec::new();
    let mut at = 12;
    while let length @ 1.. = usize::from(*message.get(at)?) {
        labels.push(String::from_utf8_lossy(message.get(at + 1..=at + length)?).to_ascii_lowercase());
        at += 1 + length;
    }
    Some((labels.join("."), message.get(12..at + 5)?))
}

/// No such name without an address; no answer but no error for another type of question, such as AAAA.
fn answer(message: &[u8], question: &[u8], address: Option<Ipv4Addr>) -> Vec<u8> {
    let given = address.filter(|_| question.ends_with(&ADDRESS_QUESTION));
    let code = if address.is_some() { 0 } else { 3 };
    let mut answer = message[..2].to_vec();
    // An authoritative answer, recursion available; one question, and perhaps one answer.
    answer.extend([0x85, 0x80 | code, 0, 1, 0, u8::from(given.is_some()), 0, 0, 0, 0]);
    answer.extend(question);
    if let Some(address) = given {
        answer.extend(ADDRESS_ANSWER);
        answer.extend(address.octets());
    }
    answer
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_question_is_read_and_answered() {
        let asked = [&[7, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, b'A', 2, b'b', b'c', 0][..], &ADDRESS_QUESTION].concat();
        let (name, asks) = question(&asked).unwrap();
        assert_eq!((name.as_str(), asks), ("a.bc", &asked[12..]));
        let found = answer(&asked, asks, Some(Ipv4Addr::new(10, 96, 0, 7)));
        assert_eq!((found[3], found[7], &found[found.len() - 4..]), (0x80, 1, &[10, 96, 0, 7][..]));
        assert_eq!(answer(&asked, asks, None)[3], 0x83);
        assert_eq!(question(&asked[..14]), None);
    }
}
