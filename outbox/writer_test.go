package outbox_test

import (
	"bytes"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/stdlib"
	_ "github.com/lib/pq"
	"go.uber.org/goleak"

	"github.com/txbox/txbox/internal/testenv"
	"github.com/txbox/txbox/outbox"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// A way is one of the entry points; all keep the same promises.
type way struct {
	name  string
	write func(t *testing.T, db *testenv.DB, w outbox.Writer, commit bool, msgs ...outbox.Message) error
}

var ways = []way{
	{"Write", writePgx},
	{"Queue", writeBatch},
	{"WriteSQL pgx", func(t *testing.T, db *testenv.DB, w outbox.Writer, commit bool, msgs ...outbox.Message) error {
		return writeSQL(t, "pgx", db, w, commit, msgs)
	}},
	{"WriteSQL lib/pq", func(t *testing.T, db *testenv.DB, w outbox.Writer, commit bool, msgs ...outbox.Message) error {
		return writeSQL(t, "postgres", db, w, commit, msgs)
	}},
}

func writePgx(t *testing.T, db *testenv.DB, w outbox.Writer, commit bool, msgs ...outbox.Message) error {
	ctx := testenv.Context(t)
	tx, err := db.Begin(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback(ctx)
	if err := w.Write(ctx, tx, msgs...); err != nil || !commit {
		return err
	}
	return tx.Commit(ctx)
}

func writeBatch(t *testing.T, db *testenv.DB, w outbox.Writer, commit bool, msgs ...outbox.Message) error {
	ctx := testenv.Context(t)
	batch := &pgx.Batch{}
	batch.BeginTx(pgx.TxOptions{})
	if err := w.Queue(ctx, batch, msgs...); err != nil {
		return err
	}
	results := db.SendBatch(ctx, batch)
	tx := results.Tx()
	defer tx.Rollback(ctx)
	if err := results.Close(); err != nil || !commit {
		return err
	}
	return tx.Commit(ctx)
}

func writeSQL(t *testing.T, driver string, db *testenv.DB, w outbox.Writer, commit bool, msgs []outbox.Message) error {
	ctx := testenv.Context(t)
	url := db.URL
	if driver == "postgres" {
		url += map[bool]string{true: "&", false: "?"}[strings.Contains(url, "?")] + "sslmode=disable"
	}
	conn, err := sql.Open(driver, url)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	tx, err := conn.BeginTx(ctx, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback()
	if err := w.WriteSQL(ctx, tx, msgs...); err != nil || !commit {
		return err
	}
	return tx.Commit()
}

func eachWay(t *testing.T, test func(t *testing.T, db *testenv.DB, write func(commit bool, msgs ...outbox.Message) error)) {
	for _, way := range ways {
		t.Run(way.name, func(t *testing.T) {
			t.Parallel()
			db := testenv.Schema(t)
			test(t, db, func(commit bool, msgs ...outbox.Message) error {
				return way.write(t, db, outbox.Writer{Schema: db.Schema}, commit, msgs...)
			})
		})
	}
}

// stored is a row as a producer would expect it.
type stored struct {
	outbox.Message
	NullKey   bool
	CreatedAt time.Time
}

func readTable(t *testing.T, db *testenv.DB, name string) []stored {
	t.Helper()
	due := "NULL::timestamptz"
	if name == "outbox_parked" {
		due = "due_at"
	}
	rows, err := db.Query(testenv.Context(t), `SELECT message_id, coalesce(key, ''), key IS NULL, exchange, routing_key, type,
		content_type, headers, payload, coalesce(`+due+`, '0001-01-01Z'), created_at FROM `+db.Table(name)+` ORDER BY id`)
	if err != nil {
		t.Fatal(err)
	}
	all, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (s stored, err error) {
		err = row.Scan(&s.ID, &s.Key, &s.NullKey, &s.Exchange, &s.RoutingKey, &s.Type,
			&s.ContentType, &s.Headers, &s.Payload, &s.NotBefore, &s.CreatedAt)
		return s, err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func TestMessageExistsIfAndOnlyIfTheTransactionCommits(t *testing.T) {
	t.Parallel()
	eachWay(t, func(t *testing.T, db *testenv.DB, write func(bool, ...outbox.Message) error) {
		kept := outbox.Message{Exchange: "kept", ID: outbox.NewID()}
		if err := errors.Join(write(false, outbox.Message{Exchange: "gone"}), write(true, kept)); err != nil {
			t.Fatal(err)
		}
		if got := readTable(t, db, "outbox"); len(got) != 1 || got[0].ID != kept.ID {
			t.Fatalf("got %+v", got)
		}
	})
}

func TestEveryFieldArrivesUnchanged(t *testing.T) {
	t.Parallel()
	everyByte := make([]byte, 256)
	for i := range everyByte {
		everyByte[i] = byte(i)
	}
	full := outbox.Message{
		ID: outbox.NewID(), Exchange: `e"x\{},'`, RoutingKey: "a.b.ü", Key: "key\n\"\\,{}NULL", Type: "order.placed",
		ContentType: "text/plain", Payload: everyByte,
		Headers: map[string]string{"traceparent": "00-a-b-01", `q"uo\te`: "line\nbreak", "empty": "", "x-datadog-trace-id": "1", "html": "<&>\u2028"},
	}
	eachWay(t, func(t *testing.T, db *testenv.DB, write func(bool, ...outbox.Message) error) {
		sparse := outbox.Message{RoutingKey: "NULL"}
		before := time.Now().Add(-time.Minute)
		if err := write(true, full, sparse); err != nil {
			t.Fatal(err)
		}
		got := readTable(t, db, "outbox")
		if len(got) != 2 {
			t.Fatalf("%d rows", len(got))
		}
		if want := fmt.Sprintf("%+v", full); fmt.Sprintf("%+v", got[0].Message) != want {
			t.Errorf("got  %+v\nwant %s", got[0].Message, want)
		}
		s := got[1]
		if s.ID.Version() != 7 || !s.NullKey || s.ContentType != "application/json" || len(s.Headers) != 0 || s.Payload == nil || len(s.Payload) != 0 {
			t.Errorf("defaults: %+v", s)
		}
		if s.CreatedAt.Before(before) {
			t.Errorf("created at %s", s.CreatedAt)
		}
	})
}

func TestIDsRiseInTheOrderOfTheMessages(t *testing.T) {
	t.Parallel()
	eachWay(t, func(t *testing.T, db *testenv.DB, write func(bool, ...outbox.Message) error) {
		msgs := make([]outbox.Message, 3000)
		for i := range msgs {
			msgs[i] = outbox.Message{Exchange: "x", Key: "k", Type: fmt.Sprint(i)}
			if i%3 == 0 { // a scheduled one among them takes the other statement
				msgs[i].Key, msgs[i].NotBefore = "", time.Unix(1, 0)
			}
		}
		if err := write(true, msgs...); err != nil {
			t.Fatal(err)
		}
		for i, s := range readTable(t, db, "outbox") {
			if s.Type != fmt.Sprint(i) {
				t.Fatalf("place %d holds message %s", i, s.Type)
			}
		}
	})
}

func TestScheduledMessagesAreParkedAndPastOnesAreNot(t *testing.T) {
	t.Parallel()
	eachWay(t, func(t *testing.T, db *testenv.DB, write func(bool, ...outbox.Message) error) {
		century := time.Now().AddDate(100, 0, 0).Truncate(time.Microsecond)
		err := write(true,
			outbox.Message{Exchange: "now"},
			outbox.Message{Exchange: "past", NotBefore: time.Now().Add(-time.Hour)},
			outbox.Message{Exchange: "ancient", NotBefore: time.Date(-9000, 1, 1, 0, 0, 0, 0, time.UTC)},
			outbox.Message{Exchange: "century", NotBefore: century},
			outbox.Message{Exchange: "last", NotBefore: time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC)})
		if err != nil {
			t.Fatal(err)
		}
		var now []string
		for _, s := range readTable(t, db, "outbox") {
			now = append(now, s.Exchange)
		}
		if fmt.Sprint(now) != "[now past ancient]" {
			t.Errorf("to be sent now: %v", now)
		}
		parked := readTable(t, db, "outbox_parked")
		if len(parked) != 2 || parked[0].Exchange != "century" || !parked[0].NotBefore.Equal(century) {
			t.Errorf("parked: %+v", parked)
		}
	})
}

func TestBadInputNamesTheFieldAndLeavesTheTransactionUsable(t *testing.T) {
	t.Parallel()
	headers := func(n, size int) map[string]string {
		h := make(map[string]string)
		for i := range n {
			h[fmt.Sprintf("h%02d", i)] = strings.Repeat("v", size)
		}
		return h
	}
	ok := outbox.Message{Exchange: "x"}
	with := func(change func(*outbox.Message)) outbox.Message { m := ok; change(&m); return m }
	for name, bad := range map[string]struct {
		field string
		msg   outbox.Message
	}{
		"no destination":        {"RoutingKey", outbox.Message{}},
		"long exchange":         {"Exchange", outbox.Message{Exchange: strings.Repeat("e", 256)}},
		"128 two-byte runes":    {"RoutingKey", outbox.Message{RoutingKey: strings.Repeat("ü", 128)}},
		"NUL in type":           {"Type", with(func(m *outbox.Message) { m.Type = "a\x00" })},
		"newline in exchange":   {"Exchange", outbox.Message{Exchange: "a\nb"}},
		"CR in content type":    {"ContentType", with(func(m *outbox.Message) { m.ContentType = "a\r" })},
		"invalid UTF-8":         {"RoutingKey", with(func(m *outbox.Message) { m.RoutingKey = "\xff" })},
		"long key":              {"Key", with(func(m *outbox.Message) { m.Key = strings.Repeat("k", 1025) })},
		"NUL in key":            {"Key", with(func(m *outbox.Message) { m.Key = "\x00" })},
		"65 headers":            {"Headers", with(func(m *outbox.Message) { m.Headers = headers(65, 1) })},
		"33 KiB of headers":     {"Headers", with(func(m *outbox.Message) { m.Headers = headers(33, 1024) })},
		"header CC":             {"Headers", with(func(m *outbox.Message) { m.Headers = map[string]string{"CC": ""} })},
		"header BCC":            {"Headers", with(func(m *outbox.Message) { m.Headers = map[string]string{"BCC": ""} })},
		"header outbox-x":       {"Headers", with(func(m *outbox.Message) { m.Headers = map[string]string{"outbox-x": ""} })},
		"header x-death":        {"Headers", with(func(m *outbox.Message) { m.Headers = map[string]string{"x-death": ""} })},
		"header x-opt-a":        {"Headers", with(func(m *outbox.Message) { m.Headers = map[string]string{"x-opt-a": ""} })},
		"long header name":      {"Headers", with(func(m *outbox.Message) { m.Headers = map[string]string{strings.Repeat("n", 256): ""} })},
		"empty header name":     {"Headers", with(func(m *outbox.Message) { m.Headers = map[string]string{"": ""} })},
		"newline in name":       {"Headers", with(func(m *outbox.Message) { m.Headers = map[string]string{"a\nb": ""} })},
		"NUL in header value":   {"Headers", with(func(m *outbox.Message) { m.Headers = map[string]string{"a": "\x00"} })},
		"invalid UTF-8 value":   {"Headers", with(func(m *outbox.Message) { m.Headers = map[string]string{"a": "\xff"} })},
		"payload one byte over": {"Payload", with(func(m *outbox.Message) { m.Payload = make([]byte, 8<<20+1) })},
		"year 10000":            {"NotBefore", with(func(m *outbox.Message) { m.NotBefore = time.Date(10000, 1, 1, 0, 0, 0, 0, time.UTC) })},
		"NotBefore and Key":     {"NotBefore", with(func(m *outbox.Message) { m.NotBefore, m.Key = time.Now(), "k" })},
		"ID twice":              {"ID", with(func(m *outbox.Message) { m.ID = uuid.MustParse("01890a5d-ac96-774b-bcce-b302099a8057") })},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ctx, db := testenv.Context(t), testenv.Schema(t)
			tx, err := db.Begin(ctx)
			if err != nil {
				t.Fatal(err)
			}
			defer tx.Rollback(ctx)
			writer := outbox.Writer{Schema: db.Schema}
			first := ok
			if bad.field == "ID" {
				first.ID = bad.msg.ID
			}
			var invalid *outbox.InvalidError
			err = writer.Write(ctx, tx, first, bad.msg)
			if !errors.As(err, &invalid) || invalid.Field != bad.field || invalid.Index != 1 || invalid.Reason == "" {
				t.Fatalf("got %v", err)
			}
			if err := errors.Join(writer.Write(ctx, tx, ok), tx.Commit(ctx)); err != nil {
				t.Fatalf("the transaction was not usable: %v", err)
			}
			if n := len(readTable(t, db, "outbox")); n != 1 {
				t.Fatalf("%d rows", n)
			}
		})
	}
}

func TestLimitsThemselvesAreAccepted(t *testing.T) {
	t.Parallel()
	headers := map[string]string{strings.Repeat("n", 255): ""}
	for i := range 63 {
		headers[fmt.Sprintf("h%02d", i)] = "v"
	}
	headers["h00"] = strings.Repeat("v", 32<<10-255-63*3-62)
	limit := outbox.Message{
		Exchange: strings.Repeat("e", 255), RoutingKey: strings.Repeat("ü", 127), Type: strings.Repeat("t", 255),
		ContentType: strings.Repeat("c", 255), Key: strings.Repeat("k", 1024), Headers: headers, Payload: make([]byte, 8<<20),
	}
	eachWay(t, func(t *testing.T, db *testenv.DB, write func(bool, ...outbox.Message) error) {
		if err := write(true, limit); err != nil {
			t.Fatal(err)
		}
		if got := readTable(t, db, "outbox"); len(got) != 1 || !bytes.Equal(got[0].Payload, limit.Payload) {
			t.Fatalf("%d rows", len(got))
		}
	})
}

func TestMisuseIsAnError(t *testing.T) {
	t.Parallel()
	ctx, db := testenv.Context(t), testenv.Schema(t)
	msg := outbox.Message{Exchange: "x"}
	finished, err := db.Begin(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := finished.Rollback(ctx); err != nil {
		t.Fatal(err)
	}
	aborted, err := db.Begin(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer aborted.Rollback(ctx)
	if _, err := aborted.Exec(ctx, "SELECT 1/0"); err == nil {
		t.Fatal("no error")
	}
	var typedNil *nilTx
	for name, got := range map[string]error{
		"is nil":                         outbox.Write(ctx, nil, msg),
		"tx is nil":                      outbox.Write(ctx, typedNil, msg),
		"outbox: tx is nil":              outbox.WriteSQL(ctx, nil, msg),
		"batch is nil":                   outbox.Queue(ctx, nil, msg),
		"closed":                         outbox.Write(ctx, finished, msg),
		"current transaction is aborted": outbox.Write(ctx, aborted, msg),
		"schema":                         outbox.Writer{Schema: "a.b"}.Write(ctx, aborted, msg),
		"MaxPayload: -1":                 outbox.Writer{MaxPayload: -1}.Write(ctx, aborted, msg),
		"Payload brings":                 outbox.Write(ctx, aborted, slices.Repeat([]outbox.Message{{Exchange: "x", Payload: make([]byte, 8<<20)}}, 33)...),
		"MaxPayload: ":                   outbox.Writer{MaxPayload: math.MaxInt32}.Write(ctx, aborted, msg),
	} {
		if got == nil || !strings.Contains(got.Error(), name) {
			t.Errorf("want %q, got %v", name, got)
		}
	}
	if err := writePgx(t, db, outbox.Writer{Schema: db.Schema}, true); err != nil {
		t.Errorf("no messages: %v", err)
	}
}

type nilTx struct{ pgx.Tx }

func TestInjectAddsHeadersAndTheCallersWin(t *testing.T) {
	t.Parallel()
	db := testenv.Schema(t)
	type key struct{}
	ctx := context.WithValue(testenv.Context(t), key{}, "from ctx")
	writer := outbox.Writer{Schema: db.Schema, Inject: func(ctx context.Context, headers map[string]string) {
		headers["traceparent"], headers["tenant"] = ctx.Value(key{}).(string), "injected"
	}}
	own := map[string]string{"tenant": "caller's"}
	err := pgx.BeginFunc(ctx, db, func(tx pgx.Tx) error {
		return writer.Write(ctx, tx, outbox.Message{Exchange: "x", Headers: own}, outbox.Message{Exchange: "x"})
	})
	if err != nil {
		t.Fatal(err)
	}
	got := readTable(t, db, "outbox")
	if fmt.Sprint(got[0].Headers, got[1].Headers) != "map[tenant:caller's traceparent:from ctx] map[tenant:injected traceparent:from ctx]" {
		t.Errorf("got %v %v", got[0].Headers, got[1].Headers)
	}
	if len(own) != 1 {
		t.Errorf("the caller's map was changed: %v", own)
	}
}

func TestSavepointRolledBackTakesItsMessagesAlong(t *testing.T) {
	t.Parallel()
	ctx, db := testenv.Context(t), testenv.Schema(t)
	writer := outbox.Writer{Schema: db.Schema}
	err := pgx.BeginFunc(ctx, db, func(tx pgx.Tx) error {
		savepoint, err := tx.Begin(ctx)
		if err != nil {
			return err
		}
		return errors.Join(
			writer.Write(ctx, savepoint, outbox.Message{Exchange: "gone"}),
			savepoint.Rollback(ctx),
			writer.Write(ctx, tx, outbox.Message{Exchange: "kept"}))
	})
	if got := readTable(t, db, "outbox"); err != nil || len(got) != 1 || got[0].Exchange != "kept" {
		t.Fatalf("%v, %+v", err, got)
	}
}

func TestHundredThousandMessagesInOneTransaction(t *testing.T) {
	t.Parallel()
	db := testenv.Schema(t)
	msgs := make([]outbox.Message, 100_000)
	for i := range msgs {
		msgs[i] = outbox.Message{Exchange: "x", Payload: []byte("payload")}
	}
	if err := writePgx(t, db, outbox.Writer{Schema: db.Schema}, true, msgs...); err != nil {
		t.Fatal(err)
	}
	var n int
	if err := db.QueryRow(testenv.Context(t), "SELECT count(*) FROM "+db.Table("outbox")).Scan(&n); err != nil || n != len(msgs) {
		t.Fatalf("%d rows, %v", n, err)
	}
}

func TestWriteWithoutTablesSaysWhatToDo(t *testing.T) {
	t.Parallel()
	db := testenv.EmptySchema(t)
	ctx := testenv.Context(t)
	writer := outbox.Writer{Schema: db.Schema}
	err := pgx.BeginFunc(ctx, db, func(tx pgx.Tx) error { return writer.Write(ctx, tx, outbox.Message{RoutingKey: "q"}) })
	if err == nil || !strings.Contains(err.Error(), "relay migrate up") {
		t.Error(err)
	}
	sqlDB := stdlib.OpenDBFromPool(db.Pool)
	defer sqlDB.Close()
	tx, err := sqlDB.BeginTx(ctx, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback()
	if err := writer.WriteSQL(ctx, tx, outbox.Message{RoutingKey: "q"}); err == nil || !strings.Contains(err.Error(), "relay migrate up") {
		t.Error(err)
	}
}

func TestWritersNeedNoMoreThanTheirGrants(t *testing.T) {
	t.Parallel()
	owner := testenv.Schema(t)
	db := owner.As(t, map[string]string{"outbox": "INSERT", "outbox_parked": "INSERT", "outbox_id_seq": "USAGE"})
	for _, way := range ways {
		for _, notBefore := range []time.Time{{}, time.Now().Add(time.Hour)} {
			err := way.write(t, db, outbox.Writer{Schema: db.Schema}, true,
				outbox.Message{RoutingKey: "q", NotBefore: notBefore, Headers: map[string]string{"a": "b"}})
			if err != nil {
				t.Errorf("%s: %s", way.name, err)
			}
		}
	}
}
