package checker_test

import (
	"context"
	"fmt"
	"strings"
	"testing"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"github.com/txbox/txbox/internal/checker"
	"github.com/txbox/txbox/internal/testenv"
)

// history is a run without a fault, told in SQL: message 4 is poison, 5 was rolled back, of
// 6 nobody knows, and 7 was given to a crash.
const history = `
INSERT INTO committed VALUES (id(1), 'k', 1, 11, 'applied'), (id(2), 'k', 2, 12, 'applied'), (id(3), NULL, 0, 13, 'applied'),
  (id(4), NULL, 0, 14, 'parked'), (id(6), 'k', 3, 16, 'applied');
INSERT INTO outcomes VALUES (id(1), 'ok'), (id(2), 'ok'), (id(3), 'async'), (id(4), 'ok'), (id(5), 'failed'), (id(6), 'unknown');
INSERT INTO wire VALUES (1, id(1), 'k', 1, 11, false), (2, id(3), NULL, 0, 13, false), (3, id(2), 'k', 2, 12, false),
  (4, id(4), NULL, 0, 14, false), (5, id(4), NULL, 0, 14, true), (6, id(6), 'k', 3, 16, false);
INSERT INTO applied VALUES (1, 'till', id(1), 'k', 1, 11), (2, 'till', id(2), 'k', 2, 12), (3, 'till', id(3), NULL, 0, 13), (4, 'till', id(6), 'k', 3, 16);
INSERT INTO parked VALUES (id(4), 'till', 'dead');
`

func id(n int) uuid.UUID { return uuid.MustParse(fmt.Sprintf("00000000-0000-0000-0000-%012d", n)) }

// told returns a checker that knows the history, and what spoils it.
func told(t *testing.T, spoilt string) *checker.Checker {
	t.Helper()
	ctx := t.Context()
	db := testenv.EmptySchema(t)
	conn, err := db.Pool.Acquire(ctx)
	must(t, err)
	t.Cleanup(conn.Release)
	_, err = conn.Exec(ctx, "CREATE SCHEMA IF NOT EXISTS "+db.Schema)
	must(t, err)
	_, err = conn.Exec(ctx, "SET search_path = "+db.Schema)
	must(t, err)
	c, err := checker.New(ctx, conn.Conn(), "till")
	must(t, err)
	_, err = conn.Exec(ctx, "CREATE FUNCTION id(n integer) RETURNS uuid LANGUAGE sql AS $$ SELECT lpad(n::text, 32, '0')::uuid $$;"+history+spoilt)
	must(t, err)
	return c
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestAHealthyRunBreaksNothing(t *testing.T) {
	t.Parallel()
	violations, err := told(t, "").Check(t.Context(), checker.Allowed{})
	must(t, err)
	if len(violations) > 0 {
		t.Errorf("%+v", violations)
	}
}

func TestEveryBrokenInvariantIsFound(t *testing.T) {
	t.Parallel()
	for _, spoilt := range []struct{ sql, want string }{
		{"DELETE FROM applied WHERE message_id = id(2)", "I1 committed, and neither 1"},
		{"DELETE FROM parked", "I1 committed, and neither 1"},
		{"INSERT INTO consumers VALUES ('other'); INSERT INTO applied SELECT pos, 'other', message_id, key, seq, hash FROM applied", "I1 committed, and neither 1"},
		{"DELETE FROM applied WHERE message_id = id(3); INSERT INTO parked VALUES (id(3), 'till', 'dead')", "I1 committed, and neither 1"},
		{"DELETE FROM parked; INSERT INTO applied VALUES (9, 'till', id(4), NULL, 0, 14)", "I1 applied, though 1"},
		{"INSERT INTO wire VALUES (9, id(5), NULL, 0, 15, false)", "I2 on the wire 1"},
		{"INSERT INTO applied VALUES (9, 'till', id(5), NULL, 0, 15)", "I2 applied 1"},
		{"INSERT INTO parked VALUES (id(5), '', 'dead')", "I2 parked 1"},
		{"INSERT INTO applied VALUES (9, 'till', id(3), NULL, 0, 13)", "I3 applied more 1"},
		{"INSERT INTO parked VALUES (id(3), 'till', 'retry')", "I3 applied, and parked 1"},
		{"INSERT INTO parked VALUES (id(3), '', 'retry')", "I3 applied, and parked 1"},
		{"UPDATE wire SET pos = 9 WHERE message_id = id(1)", "I4 first on the wire 1"},
		{"UPDATE applied SET pos = 9 WHERE message_id = id(2)", "I4 applied after 1"},
		{"UPDATE wire SET hash = 0 WHERE message_id = id(1)", "I5 changed on 1"},
		{"UPDATE wire SET key = NULL WHERE message_id = id(1)", "I5 changed on 1"},
		{"UPDATE applied SET hash = 0 WHERE message_id = id(1)", "I5 changed when 1"},
		{"INSERT INTO wire VALUES (9, id(3), NULL, 0, 13, false)", "I6 more than 0 1"},
		{"UPDATE outcomes SET outcome = 'failed' WHERE message_id = id(1)", "I9 committed 1"},
		{"UPDATE outcomes SET outcome = 'ok' WHERE message_id = id(5)", "I9 not committed, and 1"},
		{"UPDATE outcomes SET outcome = 'async' WHERE message_id = id(5)", "I9 not committed without 1"},
	} {
		t.Run(spoilt.sql, func(t *testing.T) {
			t.Parallel()
			violations, err := told(t, spoilt.sql).Check(t.Context(), checker.Allowed{})
			must(t, err)
			if len(violations) != 1 {
				t.Fatalf("want one violation, got %+v", violations)
			}
			v := violations[0]
			if got := v.Invariant + " " + v.What; !strings.HasPrefix(got, spoilt.want[:len(spoilt.want)-2]) || fmt.Sprint(v.Count) != spoilt.want[len(spoilt.want)-1:] {
				t.Errorf("want %s, got %s %d", spoilt.want, got, v.Count)
			}
			if v.Invariant != "I6" && len(v.Lives) != int(v.Count) {
				t.Errorf("lives: %q", v.Lives)
			}
		})
	}
}

func TestAllowedIsNoViolation(t *testing.T) {
	t.Parallel()
	c := told(t, `UPDATE outcomes SET outcome = 'async' WHERE message_id = id(5); INSERT INTO wire VALUES (9, id(3), NULL, 0, 13, false);
		UPDATE applied SET pos = 9 WHERE message_id = id(2)`)
	violations, err := c.Check(t.Context(), checker.Allowed{WireDuplicates: 1, LostAsync: true, Unordered: true})
	must(t, err)
	if len(violations) > 0 {
		t.Errorf("%+v", violations)
	}
}

func TestAViolationTellsTheLifeOfItsMessages(t *testing.T) {
	t.Parallel()
	violations, err := told(t, "INSERT INTO applied VALUES (9, 'till', id(1), 'k', 1, 11); INSERT INTO applied VALUES (10, 'till', id(6), 'k', 3, 16)").Check(t.Context(), checker.Allowed{})
	must(t, err)
	want := id(1).String() + ": committed key k seq 1 hash 11 expected applied; client told ok; wire 1 key k seq 1 hash 11; " +
		"applied 1 by till seq 1 hash 11; applied 9 by till seq 1 hash 11"
	if len(violations) == 0 || violations[0].Invariant != "I3" || violations[0].Lives[0] != want {
		t.Errorf("want %s\ngot %+v", want, violations)
	}
}

func TestWhatIsLoadedAndWatchedIsChecked(t *testing.T) {
	t.Parallel()
	c := told(t, "")
	ctx := context.Background()
	from, err := pgx.Connect(ctx, testenv.DatabaseURL(t))
	must(t, err)
	defer from.Close(ctx)
	const n = 1000
	must(t, c.Load(ctx, "committed", from, fmt.Sprintf(`SELECT lpad((n + 100)::text, 32, '0')::uuid, 'key', n, n, 'applied' FROM generate_series(1, %d) n`, n)))
	must(t, c.Load(ctx, "applied", from, fmt.Sprintf(`SELECT 100 + n, 'till', lpad((n + 100)::text, 32, '0')::uuid, 'key', n, n FROM generate_series(1, %d) n WHERE n <> 500`, n)))
	key := "key"
	must(t, c.Wire(ctx, 100, []checker.Seen{{MessageID: id(101), Key: &key, Seq: 1, Hash: 1}, {MessageID: id(102), Key: &key, Seq: 2, Hash: 7}}))
	must(t, c.Outcomes(ctx, strings.NewReader("ok "+id(101).String()+"\nfailed "+id(102).String()+"\nok 0000")))
	violations, err := c.Check(ctx, checker.Allowed{})
	must(t, err)
	var got []string
	for _, v := range violations {
		got = append(got, fmt.Sprint(v.Invariant, v.Count))
	}
	if fmt.Sprint(got) != "[I11 I51 I91]" {
		t.Errorf("%v: %+v", got, violations)
	}
	if m, err := c.Messages(ctx); err != nil || m != n+5 {
		t.Errorf("%d messages, %v", m, err)
	}
	if err := c.Load(ctx, "nothing", from, "SELECT 1"); err == nil {
		t.Error("loaded into no table")
	}
	if err := c.Load(ctx, "parked", from, "SELECT 1/0"); err == nil {
		t.Error("no error of the query")
	}
}
