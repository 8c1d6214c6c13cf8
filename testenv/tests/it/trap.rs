//! The trap answers everybody and remembers everything.

use testenv::{Env, Trap};

use crate::raw;

#[tokio::test]
async fn a_trap_remembers_connections_requests_credentials_and_bytes() {
    for tls in [true, false] {
        let trap = Trap::start(Env::get(), tls).await.unwrap();
        assert_eq!((trap.connections(), trap.requests().len()), (0, 0));

        let url = format!("{}/v2/any?query=1", trap.url());
        assert_eq!(raw().get(&url).send().await.unwrap().status(), 200);
        trap.answer(401, &[("WWW-Authenticate", "Basic realm=\"trap\"")], "no").unwrap();
        let put = raw().put(&url).basic_auth("me", Some("secret")).body(vec![0; 100_000]).send().await.unwrap();
        assert_eq!((put.status().as_u16(), put.headers().contains_key("WWW-Authenticate")), (401, true));
        assert_eq!(put.text().await.unwrap(), "no");

        assert_eq!((trap.connections(), trap.authorized(), trap.body_bytes()), (2, 1, 100_000));
        let requests = trap.requests();
        assert_eq!((requests[0].method.as_str(), requests[0].path.as_str()), ("GET", "/v2/any?query=1"));
        assert!(requests[1].headers.contains_key("Authorization"));
    }
}

#[tokio::test]
async fn a_connection_without_a_request_is_seen_too() {
    let trap = Trap::start(Env::get(), true).await.unwrap();
    // The other side does not trust this authority.
    assert!(reqwest::get(trap.url()).await.is_err());
    assert_eq!((trap.connections(), trap.requests().len()), (1, 0));
}
