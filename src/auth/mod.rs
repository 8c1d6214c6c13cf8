//! Logging in to registries: which credential belongs to which repository, what a registry asks for, and the tokens
//! it is answered with.
//!
//! [`CredentialStore`] matches as the kubelet does: globs and ports in keys, path prefixes on a `/` boundary, longest
//! first. [`Challenge`] reads `WWW-Authenticate` (RFC 9110, section 11.6.1). [`TokenCache`] keeps bearer tokens, fetches
//! one per key at a time and renews them at 80 % of their life. Secrets are in a type that does not print them.
//!
//! ```
//! use imagemirror::auth::CredentialStore;
//! let config = br#"{"auths":{"*.example.com/team":{"username":"robot","password":"secret"}}}"#;
//! let store = CredentialStore::from_docker_config_json(config, "Secret \"pull\"")?;
//! let found = store.matching(&"eu.example.com".parse()?, &"team/app".parse()?);
//! assert_eq!(found[0].username(), "robot");
//! assert!(store.matching(&"eu.example.com".parse()?, &"teamwork/app".parse()?).is_empty());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod challenge;
pub mod cloud;
mod credential;
mod exchange;
#[cfg(test)]
mod matching;
#[cfg(test)]
mod properties;
mod realm;
pub(crate) mod slots;
mod store;
mod token;

pub use challenge::Challenge;
pub use credential::Credential;
pub use exchange::{BoxError, Exchange, ExchangeError, Http, Identity, Issued, NewRepository, ToMetadata, Unusable};
pub use realm::realm_is_trusted;
pub use store::{ConfigError, CredentialStore, Entry};
pub use token::{Grant, Next, NextLogin, Scope, Token, TokenCache, TokenError, TokenKey};
