//! The forwarder is as slow as it says.

use std::time::{Duration, Instant};

use testenv::{Env, Forwarder, Image};

use crate::{client, repository};

#[tokio::test]
async fn a_slow_line_takes_its_time_and_changes_nothing() {
    let env = Env::get();
    let image = Image::single(fastrand::u64(..), &[1_000_000]);
    let repository = repository("slow");
    client(&env.source).push(&repository, "latest", &image).await.unwrap();

    let line = Forwarder::to(&env.source.host).bytes_per_second(2_000_000).start().await.unwrap();
    let started = Instant::now();
    assert!(client(&env.source.at(&line.host())).holds(&repository, "latest", &image).await.unwrap());
    let took = started.elapsed();
    assert!((Duration::from_millis(490)..Duration::from_secs(2)).contains(&took), "{took:?}");
}

#[tokio::test]
async fn a_far_line_delays_connect_and_round_trips() {
    let env = Env::get();
    let line = Forwarder::to(&env.open.host).delay(Duration::from_millis(20)).start().await.unwrap();
    let started = Instant::now();
    assert!(client(&env.open.at(&line.host())).tags("any/repository").await.unwrap().is_empty());
    let took = started.elapsed();
    assert!((Duration::from_millis(80)..Duration::from_secs(1)).contains(&took), "{took:?}");
}
