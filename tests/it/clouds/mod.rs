//! The registries of clouds, and every way to log in there: real registries of this machine under the clouds' own names, in
//! front of them what the clouds document of their logins. Names in the objects are as users write them; the operator's
//! configuration leads to the stand-ins.

mod azure;
mod guides;
mod logins;
