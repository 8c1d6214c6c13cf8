//! JSON in which no object names a key twice. Two parsers may read such a document differently, so that what one
//! checks is not what another runs (CVE-2021-41190); a manifest like that is not copied. Nor is one of very many
//! values: parsed, each takes fifty times the room of the shortest text for it.

use std::{cell::Cell, fmt};

use serde::de::{self, DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

/// An index of as many manifests as are copied has fewer values, with platforms and annotations.
const MAX_VALUES: usize = 100_000;

/// Parses bytes as JSON and refuses duplicate keys at any depth.
pub(super) fn parse(bytes: &[u8]) -> Result<Value, serde_json::Error> {
    let left = Cell::new(MAX_VALUES);
    let mut deserializer = serde_json::Deserializer::from_slice(bytes);
    let value = Strict(&left).deserialize(&mut deserializer)?;
    deserializer.end()?;
    Ok(value)
}

/// The values that are left to be read.
#[derive(Clone, Copy)]
struct Strict<'a>(&'a Cell<usize>);

impl<'de> DeserializeSeed<'de> for Strict<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        let left = self.0.get().checked_sub(1);
        self.0.set(left.ok_or_else(|| de::Error::custom(format_args!("more than {MAX_VALUES} values")))?);
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Strict<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON without duplicate keys")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_f64<E: de::Error>(self, value: f64) -> Result<Value, E> {
        Number::from_f64(value).map(Value::Number).ok_or_else(|| E::custom("not a finite number"))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::String(value.to_owned()))
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Value, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = access.next_element_seed(self)? {
            items.push(item);
        }
        Ok(Value::Array(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Value, A::Error> {
        let mut map = Map::new();
        while let Some(key) = access.next_key::<String>()? {
            if map.contains_key(&key) {
                return Err(de::Error::custom(format_args!("duplicate key {key:?}")));
            }
            map.insert(key, access.next_value_seed(self)?);
        }
        Ok(Value::Object(map))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn duplicate_keys_are_refused_at_any_depth() {
        assert!(parse(br#"{"a":1,"b":[{"c":null,"d":1.5}],"e":true,"f":"x","g":-1}"#).is_ok());
        for bad in [r#"{"a":1,"a":1}"#, r#"{"a":{"b":1,"b":2}}"#, r#"[{"b":1,"b":2}]"#] {
            assert!(parse(bad.as_bytes()).unwrap_err().to_string().contains("duplicate key"), "{bad}");
        }
    }

    #[test]
    fn very_many_values_are_refused_and_as_many_as_an_index_has_are_not() {
        let list = |count| format!("[{}0]", "{},".repeat(count));
        assert!(parse(list(MAX_VALUES - 2).as_bytes()).is_ok());
        assert!(parse(list(MAX_VALUES - 1).as_bytes()).unwrap_err().to_string().contains("more than 100000 values"));
        assert!(parse(br#"{"a":1} x"#).is_err(), "something follows");
    }

    #[test]
    fn deep_nesting_is_an_error_and_not_a_stack_overflow() {
        let bomb = "[".repeat(100_000);
        assert!(parse(bomb.as_bytes()).is_err());
    }
}
