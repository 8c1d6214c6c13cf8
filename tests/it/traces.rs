//! Traces, in programs built with the feature `otel`: `cargo test --features otel --test it traces`.

use anyhow::{Result, ensure};
use serde_json::json;
use testenv::Image;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
};

use crate::support::{PATIENCE, Place};

/// Takes one request as a collector does, and returns its head and body.
async fn collected(listener: &TcpListener) -> Result<(String, Vec<u8>)> {
    let (mut stream, _) = listener.accept().await?;
    let mut received = Vec::new();
    loop {
        ensure!(stream.read_buf(&mut received).await? > 0, "the request broke off");
        let Some(end) = received.windows(4).position(|four| four == b"\r\n\r\n") else { continue };
        let head = String::from_utf8(received[..end].to_vec())?.to_ascii_lowercase();
        let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")?.parse().ok()).unwrap_or(0);
        if received.len() >= end + 4 + length {
            stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n").await?;
            return Ok((head, received.split_off(end + 4)));
        }
    }
}

#[tokio::test]
async fn a_collector_gets_a_span_for_a_run_and_for_each_of_its_images() -> Result<()> {
    let place = Place::new("traces").await?;
    place.push(&place.env.source, "agent", "1", &Image::single(66, &[1000])).await?;
    let collector = TcpListener::bind("127.0.0.1:0").await?;
    let endpoint = format!("http://{}", collector.local_addr()?);
    let config = json!({"watchNamespaces": [place.namespace], "networks": {"allow": ["127.0.0.0/8"]}});
    let variables = [("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint.as_str()), ("OTEL_BSP_SCHEDULE_DELAY", "100")];
    let _operator = place.operator_where(&config, &[], &variables)?;
    place.apply("m", &place.spec(&place.env.source, &place.env.target, &[("agent", &["1"])])).await?;
    let mut wanted = vec!["run".to_owned(), "image".to_owned(), "image copied".to_owned()];
    wanted
        .extend([format!("{}/m", place.namespace), format!("{}/{}", place.env.source.host, place.repository("agent"))]);
    let all = async {
        while !wanted.is_empty() {
            let (head, body) = collected(&collector).await?;
            ensure!(
                head.starts_with("post /v1/traces ") && head.contains("content-type: application/x-protobuf"),
                "{head}"
            );
            // Protobuf holds text as it is; before it comes its length.
            let has = |text: &str| {
                let text = [&[u8::try_from(text.len()).unwrap_or_default()], text.as_bytes()].concat();
                body.windows(text.len()).any(|window| window == text)
            };
            wanted.retain(|text| !has(text));
            ensure!(!has("reconcile"), "a look at an object is no trace");
        }
        Ok(())
    };
    tokio::time::timeout(PATIENCE, all).await?
}
