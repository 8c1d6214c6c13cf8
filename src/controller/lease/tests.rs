//! The decision as a table, and the election against an API server of one Lease.

use super::*;

const LEASE: Duration = Duration::from_secs(15);

fn record(holder: &str) -> LeaseSpec {
    held(LeaseSpec::default(), holder, LEASE, true, Timestamp::now())
}

fn after(record: &LeaseSpec, elapsed: Duration) -> Decision {
    let seen = Instant::now();
    decide(record, seen, seen + elapsed, "us", LEASE)
}

#[test]
fn an_absent_or_released_lease_is_taken_at_once() {
    assert_eq!(after(&LeaseSpec::default(), Duration::ZERO), Decision::Acquire);
    assert_eq!(after(&released(record("them"), Timestamp::now()), Duration::ZERO), Decision::Acquire);
}

#[test]
fn ours_is_renewed_even_after_a_restart() {
    assert_eq!(after(&record("us"), Duration::ZERO), Decision::Renew);
    assert_eq!(after(&record("us"), LEASE * 2), Decision::Renew);
}

#[test]
fn another_holder_has_the_whole_lease_from_when_it_was_last_seen_to_change() {
    assert_eq!(after(&record("them"), Duration::ZERO), Decision::Wait(LEASE));
    assert_eq!(after(&record("them"), Duration::from_secs(14)), Decision::Wait(Duration::from_secs(1)));
    assert_eq!(after(&record("them"), LEASE), Decision::Acquire);
}

#[test]
fn clocks_that_differ_do_not_matter() {
    for renewed in [Timestamp::UNIX_EPOCH, Timestamp::MAX] {
        let record = LeaseSpec { renew_time: Some(MicroTime(renewed)), ..record("them") };
        assert_eq!(after(&record, Duration::from_secs(14)), Decision::Wait(Duration::from_secs(1)));
        assert_eq!(after(&record, LEASE), Decision::Acquire);
    }
}

#[test]
fn the_holders_own_duration_counts_if_it_makes_sense() {
    let of = |seconds| LeaseSpec { lease_duration_seconds: seconds, ..record("them") };
    assert_eq!(after(&of(Some(60)), LEASE), Decision::Wait(Duration::from_secs(45)));
    for senseless in [None, Some(0), Some(-5)] {
        assert_eq!(after(&of(senseless), Duration::ZERO), Decision::Wait(LEASE));
    }
}

#[test]
fn transitions_count_changes_of_the_holder_only() {
    let now = Timestamp::from_second(100).unwrap();
    let first = record("them");
    assert_eq!(first.lease_transitions, Some(0));
    let renewed = held(first.clone(), "them", LEASE, false, now);
    assert_eq!((renewed.lease_transitions, &renewed.acquire_time), (Some(0), &first.acquire_time));
    let taken = held(renewed, "us", LEASE, true, now);
    assert_eq!((taken.lease_transitions, taken.acquire_time), (Some(1), Some(MicroTime(now))));
    assert_eq!(released(record("us"), now).holder_identity.as_deref(), Some(""));
}

#[test]
fn a_lease_is_written_in_whole_seconds_and_never_as_zero() {
    let written = [15_000, 1_500, 10].map(|millis| whole_seconds(Duration::from_millis(millis)));
    assert_eq!(written, [15, 2, 1]);
}

/// An API server with one Lease: what GET, POST and PUT do with it, conflicts included.
#[derive(Clone, Default)]
struct FakeApi(std::sync::Arc<std::sync::Mutex<Option<Object>>>);

impl FakeApi {
    async fn client(&self) -> Client {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let api = self.clone();
        let answer = move |method: axum::http::Method, body: axum::body::Bytes| {
            let (code, body) = api.answer(method.as_str(), &body);
            async move { (axum::http::StatusCode::from_u16(code).unwrap(), body) }
        };
        tokio::spawn(async { axum::serve(listener, axum::Router::new().fallback(answer)).await });
        let mut config = kube::Config::new(url.parse().unwrap());
        config.default_retry = false;
        Client::try_from(config).unwrap()
    }

    fn answer(&self, method: &str, body: &[u8]) -> (u16, String) {
        let status = |code: u16, reason: &str| {
            let status = serde_json::json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": reason, "reason": reason, "code": code});
            (code, status.to_string())
        };
        let mut stored = self.0.lock().unwrap();
        let version = |object: &Object| object.metadata.resource_version.clone();
        if method != "GET" {
            let mut sent: Object = serde_json::from_slice(body).unwrap();
            if stored.as_ref().and_then(version) != version(&sent) {
                return status(409, "Conflict");
            }
            let next = version(&sent).map_or(1, |version| version.parse::<u64>().unwrap() + 1);
            sent.metadata.resource_version = Some(next.to_string());
            *stored = Some(sent);
        }
        match &*stored {
            Some(object) => (200, serde_json::to_string(object).unwrap()),
            None => status(404, "NotFound"),
        }
    }

    async fn candidate(&self, identity: &str) -> (Lease, watch::Receiver<Option<Instant>>, Gates) {
        let options = LeaseOptions {
            namespace: "n".to_owned(),
            name: "l".to_owned(),
            identity: identity.to_owned(),
            duration: Duration::from_secs(1),
            renew: Duration::from_millis(50),
            api_timeout: Duration::from_secs(5),
        };
        let gates = Gates::new(&[GATE]);
        let (lease, held_until) = Lease::new(self.client().await, options, gates.clone());
        (lease, held_until, gates)
    }

    /// Somebody else writes the object.
    fn meddle(&self, change: impl FnOnce(&mut Object)) {
        let mut stored = self.0.lock().unwrap();
        let object = stored.as_mut().unwrap();
        let version = object.metadata.resource_version.as_ref().unwrap().parse::<u64>().unwrap();
        object.metadata.resource_version = Some((version + 1).to_string());
        change(object);
    }
}

#[tokio::test]
async fn a_released_lease_goes_to_a_standby_which_was_ready_before() {
    let (api, run) = (FakeApi::default(), CancellationToken::new());
    let (mut leader, held_until, _) = api.candidate("leader").await;
    let (mut standby, _, ready) = api.candidate("standby").await;
    assert!(leader.acquire(&run).await && held_until.borrow().is_some());
    let waits = standby.attempt(Duration::from_secs(5)).await;
    assert!(matches!(waits, Attempt::HeldByOther(_)) && ready.ready());
    leader.release().await;
    assert_eq!(*held_until.borrow(), None);
    assert!(matches!(standby.attempt(Duration::from_secs(5)).await, Attempt::Held));
    let spec = api.0.lock().unwrap().clone().unwrap().spec.unwrap();
    assert_eq!((spec.holder_identity.as_deref(), spec.lease_transitions), (Some("standby"), Some(1)));
}

#[tokio::test]
async fn a_write_in_between_is_read_and_the_lease_kept() {
    let (api, run) = (FakeApi::default(), CancellationToken::new());
    let (mut lease, ..) = api.candidate("us").await;
    assert!(lease.acquire(&run).await);
    api.meddle(|object| object.metadata.labels = Some([("a".to_owned(), "b".to_owned())].into()));
    assert!(matches!(lease.attempt(Duration::from_secs(5)).await, Attempt::Conflict));
    assert!(matches!(lease.attempt(Duration::from_secs(5)).await, Attempt::Held));
}

#[tokio::test]
async fn a_lease_that_another_took_is_lost_at_once() {
    let (api, run) = (FakeApi::default(), CancellationToken::new());
    let (mut lease, held_until, _) = api.candidate("us").await;
    assert!(lease.acquire(&run).await);
    api.meddle(|object| object.spec = Some(record("them")));
    assert_eq!(lease.keep(&run).await, KeepEnd::Lost);
    assert_eq!(*held_until.borrow(), None);
}

#[tokio::test]
async fn an_api_server_that_is_away_costs_the_lease_when_it_ends_and_not_before() {
    let (api, run) = (FakeApi::default(), CancellationToken::new());
    let (mut lease, held_until, _) = api.candidate("us").await;
    assert!(lease.acquire(&run).await);
    let ends = held_until.borrow().unwrap();
    let mut nowhere = kube::Config::new("http://127.0.0.1:9".parse().unwrap());
    nowhere.default_retry = false;
    lease.api = Api::namespaced(Client::try_from(nowhere).unwrap(), "n");
    assert_eq!(lease.keep(&run).await, KeepEnd::Lost);
    assert!(Instant::now() >= ends && held_until.borrow().is_none());
}

#[tokio::test]
async fn the_shutdown_leaves_the_lease_to_be_given_up() {
    let (api, run) = (FakeApi::default(), CancellationToken::new());
    let (mut lease, held_until, _) = api.candidate("us").await;
    assert!(lease.acquire(&run).await);
    run.cancel();
    assert_eq!(lease.keep(&run).await, KeepEnd::Shutdown);
    assert!(held_until.borrow().is_some());
    lease.release().await;
    assert!(!lease.acquire(&run).await);
}
