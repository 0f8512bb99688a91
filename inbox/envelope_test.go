package inbox

import (
	"bytes"
	"maps"
	"testing"

	"pgregory.net/rapid"
)

func TestPackedPairsAreUnpackedAsTheyWere(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		raw := rapid.Map(rapid.SliceOf(rapid.Byte()), func(b []byte) string { return string(b) })
		pairs := rapid.MapOf(raw, raw).Draw(t, "pairs")
		packed := pack(pairs)
		got, err := unpack(packed)
		if err != nil || !maps.Equal(got, pairs) || !bytes.Equal(packed, pack(got)) {
			t.Fatalf("got %q, %v, want %q", got, err, pairs)
		}
		if len(packed) > 0 {
			if cut, err := unpack(packed[:len(packed)-1]); err == nil && maps.Equal(cut, pairs) {
				t.Fatal("a cut one is the same")
			}
		}
	})
}

func TestUnpackRefusesGarbage(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		_, _ = unpack(rapid.SliceOf(rapid.Byte()).Draw(t, "garbage")) // must not panic
	})
	for _, b := range [][]byte{{5, 'a'}, {1, 'a'}, {0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01}} {
		if pairs, err := unpack(b); err == nil {
			t.Errorf("%v: %v", b, pairs)
		}
	}
}
