//! Any value of any body comes back from its bytes.
//!
//! The values are drawn by [`Draw`], a decoder that reads from a random generator instead of bytes:
//! a body's own `Deserialize` asks it for one field after the other, so that no variant or field can
//! be forgotten here. (A field that is neither written nor read shows only in the other tests.)

use cfs_wire::ShardId;
use cfs_wire::body;
use cfs_wire::data::{DataError, FetchCall, Registration, ReserveCall, ReserveReply, StoreCall, StoreReply};
use cfs_wire::meta::{
    EventsCall, EventsReply, MetaCall, MetaError, MetaResult, MountCall, MountResult, ShardOp, ShardReply,
};
use proptest::prelude::*;
use serde::Serialize;
use serde::de::value::{Error as Refused, U32Deserializer};
use serde::de::{
    DeserializeOwned, DeserializeSeed, Deserializer, EnumAccess, Error as _, IntoDeserializer, MapAccess, SeqAccess,
    VariantAccess, Visitor,
};
use std::fmt::Debug;

/// Draws of one value before it counts as one that can't be drawn: some fields refuse most numbers.
const TRIES: usize = 1000;

/// SplitMix64 (Steele, Lea, Flood 2014).
struct Draw(u64);

impl Draw {
    fn word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.word() % bound as u64) as usize
    }

    /// A number of any size: as many bits as are drawn first, and often the least or the most.
    fn number(&mut self) -> u128 {
        let wide = (u128::from(self.word()) << 64) | u128::from(self.word());
        match self.below(8) {
            0 => 0,
            1 => u128::MAX,
            _ => wide >> self.below(128),
        }
    }

    /// Elements of a sequence.
    fn length(&mut self) -> usize {
        match self.below(16) {
            0 => 200,
            few => few % 4,
        }
    }

    fn bytes(&mut self) -> Vec<u8> {
        (0..self.length()).map(|_| self.word() as u8).collect()
    }

    fn text(&mut self) -> String {
        (0..self.length()).map(|_| char::from_u32(self.word() as u32 % 0x300).unwrap_or('\u{fffd}')).collect()
    }
}

macro_rules! numbers {
    ($($method:ident $visit:ident $type:ty),*) => {$(
        fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Refused> {
            visitor.$visit(self.number() as $type)
        }
    )*};
}

impl<'de> Deserializer<'de> for &mut Draw {
    type Error = Refused;

    numbers! {
        deserialize_i8 visit_i8 i8, deserialize_i16 visit_i16 i16, deserialize_i32 visit_i32 i32,
        deserialize_i64 visit_i64 i64, deserialize_i128 visit_i128 i128, deserialize_u8 visit_u8 u8,
        deserialize_u16 visit_u16 u16, deserialize_u32 visit_u32 u32, deserialize_u64 visit_u64 u64,
        deserialize_u128 visit_u128 u128
    }

    fn is_human_readable(&self) -> bool {
        false
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Refused> {
        visitor.visit_bool(self.below(2) == 1)
    }

    fn deserialize_str<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Refused> {
        visitor.visit_string(self.text())
    }

    fn deserialize_string<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Refused> {
        visitor.visit_string(self.text())
    }

    fn deserialize_bytes<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Refused> {
        visitor.visit_byte_buf(self.bytes())
    }

    fn deserialize_byte_buf<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Refused> {
        visitor.visit_byte_buf(self.bytes())
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Refused> {
        match self.below(3) {
            0 => visitor.visit_none(),
            _ => visitor.visit_some(self),
        }
    }

    fn deserialize_unit<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Refused> {
        visitor.visit_unit()
    }

    fn deserialize_unit_struct<V: Visitor<'de>>(self, _: &'static str, visitor: V) -> Result<V::Value, Refused> {
        visitor.visit_unit()
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, _: &'static str, visitor: V) -> Result<V::Value, Refused> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Refused> {
        let left = self.length();
        visitor.visit_seq(Several { draw: self, left })
    }

    fn deserialize_tuple<V: Visitor<'de>>(self, left: usize, visitor: V) -> Result<V::Value, Refused> {
        visitor.visit_seq(Several { draw: self, left })
    }

    fn deserialize_tuple_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        left: usize,
        visitor: V,
    ) -> Result<V::Value, Refused> {
        visitor.visit_seq(Several { draw: self, left })
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Refused> {
        let left = self.length();
        visitor.visit_map(Several { draw: self, left })
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Refused> {
        visitor.visit_seq(Several { draw: self, left: fields.len() })
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Refused> {
        let variant = self.below(variants.len()) as u32;
        visitor.visit_enum(Variant { draw: self, variant })
    }

    fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Refused> {
        Err(Refused::custom("bytes of a body do not say what they are"))
    }

    serde::forward_to_deserialize_any! { f32 f64 char identifier ignored_any }
}

/// The elements of a sequence, a map or a structure.
struct Several<'a> {
    draw: &'a mut Draw,
    left: usize,
}

impl<'de> SeqAccess<'de> for Several<'_> {
    type Error = Refused;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, Refused> {
        if self.left == 0 {
            return Ok(None);
        }
        self.left -= 1;
        seed.deserialize(&mut *self.draw).map(Some)
    }
}

impl<'de> MapAccess<'de> for Several<'_> {
    type Error = Refused;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, Refused> {
        self.next_element_seed(seed)
    }

    fn next_value_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<T::Value, Refused> {
        seed.deserialize(&mut *self.draw)
    }
}

struct Variant<'a> {
    draw: &'a mut Draw,
    variant: u32,
}

impl<'de, 'a> EnumAccess<'de> for Variant<'a> {
    type Error = Refused;
    type Variant = &'a mut Draw;

    fn variant_seed<T: DeserializeSeed<'de>>(self, seed: T) -> Result<(T::Value, &'a mut Draw), Refused> {
        let number: U32Deserializer<Refused> = self.variant.into_deserializer();
        Ok((seed.deserialize(number)?, self.draw))
    }
}

impl<'de> VariantAccess<'de> for &mut Draw {
    type Error = Refused;

    fn unit_variant(self) -> Result<(), Refused> {
        Ok(())
    }

    fn newtype_variant_seed<T: DeserializeSeed<'de>>(self, seed: T) -> Result<T::Value, Refused> {
        seed.deserialize(self)
    }

    fn tuple_variant<V: Visitor<'de>>(self, length: usize, visitor: V) -> Result<V::Value, Refused> {
        self.deserialize_tuple(length, visitor)
    }

    fn struct_variant<V: Visitor<'de>>(self, fields: &'static [&'static str], visitor: V) -> Result<V::Value, Refused> {
        self.deserialize_tuple(fields.len(), visitor)
    }
}

/// Draws a value, writes it, and reads it back whole; from fewer bytes it is an error or another one.
fn comes_back<T: Serialize + DeserializeOwned + Debug>(draw: &mut Draw) -> Result<(), TestCaseError> {
    let drawn = (0..TRIES).find_map(|_| T::deserialize(&mut *draw).ok());
    let Some(value) = drawn else {
        return Err(TestCaseError::fail(format!("no {} was drawn", std::any::type_name::<T>())));
    };
    let bytes = body::encode(&value).map_err(|error| TestCaseError::fail(format!("{value:?}: {error}")))?;
    let read = body::decode::<T>(&bytes).map_err(|error| TestCaseError::fail(format!("{value:?}: {error}")))?;
    prop_assert_eq!(format!("{read:?}"), format!("{value:?}"));
    if !bytes.is_empty() {
        let cut = &bytes[..draw.below(bytes.len())];
        if let Ok(other) = body::decode::<T>(cut) {
            prop_assert_ne!(format!("{other:?}"), format!("{value:?}"), "bytes that say nothing");
        }
    }
    Ok(())
}

proptest! {
    #[test]
    fn any_value_of_any_body_comes_back(seed: u64) {
        let draw = &mut Draw(seed);
        comes_back::<MetaCall>(draw)?;
        comes_back::<MetaResult>(draw)?;
        comes_back::<MountCall>(draw)?;
        comes_back::<MountResult>(draw)?;
        comes_back::<EventsCall>(draw)?;
        comes_back::<Result<EventsReply, MetaError>>(draw)?;
        comes_back::<(ShardId, ShardOp)>(draw)?;
        comes_back::<Result<ShardReply, MetaError>>(draw)?;
        comes_back::<StoreCall>(draw)?;
        comes_back::<Result<StoreReply, DataError>>(draw)?;
        comes_back::<FetchCall>(draw)?;
        comes_back::<Result<(), DataError>>(draw)?;
        comes_back::<ReserveCall>(draw)?;
        comes_back::<Result<ReserveReply, DataError>>(draw)?;
        comes_back::<Registration>(draw)?;
    }
}
