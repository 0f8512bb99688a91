package inbox_test

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	"golang.org/x/sync/errgroup"

	"github.com/txbox/txbox/inbox"
	"github.com/txbox/txbox/internal/testenv"
)

var errTest = errors.New("a failure of the test")

// testLimit is how long a test waits for what must happen.
const testLimit = 30 * time.Second

func TestRecordIsTrueOncePerConsumerAndMessage(t *testing.T) {
	t.Parallel()
	e := setup(t)
	for _, want := range []bool{true, false} {
		for _, consumer := range []string{"a", "b"} {
			err := pgx.BeginFunc(e.ctx, e.Pool, func(tx pgx.Tx) error {
				first, err := e.Record(e.ctx, tx, consumer, "m")
				if first != want {
					t.Errorf("%s: first is %v", consumer, first)
				}
				return err
			})
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, driver := range []string{"pgx", "postgres"} {
		for _, want := range []bool{true, false} {
			if first := e.recordSQL(t, driver, "sql "+driver); first != want {
				t.Errorf("%s: first is %v", driver, first)
			}
		}
	}
}

func (e *env) recordSQL(t *testing.T, driver, id string) (first bool) {
	t.Helper()
	db, err := sql.Open(driver, withParam(t, e.URL, "sslmode", "disable"))
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	tx, err := db.BeginTx(e.ctx, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback()
	first, err = e.RecordSQL(e.ctx, tx, "a", id)
	if err := errors.Join(err, tx.Commit()); err != nil {
		t.Fatal(err)
	}
	return first
}

func TestRecordGoesWithItsTransaction(t *testing.T) {
	t.Parallel()
	e := setup(t)
	err := pgx.BeginFunc(e.ctx, e.Pool, func(tx pgx.Tx) error {
		first, err := e.Record(e.ctx, tx, consumer, "m")
		if !first || err != nil {
			t.Errorf("%v, %v", first, err)
		}
		return errTest
	})
	if !errors.Is(err, errTest) {
		t.Fatal(err)
	}
	e.want(t, "m", 0, 0)
}

func TestRecordGivesFiveConcurrentTwinsOneEffect(t *testing.T) {
	t.Parallel()
	for _, isolation := range []string{"default", "serializable"} {
		t.Run(isolation, func(t *testing.T) {
			t.Parallel()
			e := setup(t)
			db := e.Pool
			if isolation == "serializable" {
				db = e.pool(t, e.serializable(t))
			}
			for round := range 5 {
				var group errgroup.Group
				for range 5 {
					group.Go(func() error { return e.recordUntilDone(db, fmt.Sprint(round)) })
				}
				if err := group.Wait(); err != nil {
					t.Fatal(err)
				}
				e.want(t, fmt.Sprint(round), 1, 1)
			}
		})
	}
}

// recordUntilDone does as the documentation of Record says: 40001 runs again.
func (e *env) recordUntilDone(db *pgxpool.Pool, id string) error {
	for {
		err := pgx.BeginFunc(e.ctx, db, func(tx pgx.Tx) error {
			first, err := e.Record(e.ctx, tx, consumer, id)
			if err != nil || !first {
				return err
			}
			_, err = tx.Exec(e.ctx, e.effectSQL(), id)
			return err
		})
		if pgErr := (*pgconn.PgError)(nil); !errors.As(err, &pgErr) || pgErr.Code != "40001" {
			return err
		}
	}
}

// A service that only records needs no more than INSERT on its table.
func TestRecordAndHandleNeedNoMoreThanInsert(t *testing.T) {
	t.Parallel()
	e := setup(t)
	role := pgx.Identifier{testenv.Name(t)}.Sanitize()
	e.exec(t, "CREATE ROLE "+role)
	t.Cleanup(func() {
		e.exec(t, "DROP OWNED BY "+role)
		e.exec(t, "DROP ROLE "+role)
	})
	schema := pgx.Identifier{e.DB.Schema}.Sanitize()
	e.exec(t, "GRANT USAGE ON SCHEMA "+schema+" TO "+role)
	e.exec(t, "GRANT INSERT ON "+e.Table("inbox")+" TO "+role)
	dbURL := withParam(t, e.URL, "role", strings.Trim(role, `"`))
	for _, entry := range entries {
		handle := entry.open(t, e, dbURL)
		for _, want := range []bool{true, false} {
			first, err := handle(e.ctx, entry.name, func(context.Context, session) error { return nil })
			if first != want || err != nil {
				t.Errorf("%s: %v, %v", entry.name, first, err)
			}
		}
	}
}

func TestNamesThatCannotBeRecordedAreRefused(t *testing.T) {
	t.Parallel()
	e := setup(t)
	ok := strings.Repeat("é", 50)
	for _, c := range []struct{ consumer, id, want string }{
		{"", "m", "consumer"}, {ok + "x", "m", "consumer"}, {"a\x00", "m", "consumer"}, {"a\xff", "m", "consumer"},
		{"a", "", "messageID"}, {"a", strings.Repeat("x", 256), "messageID"},
		{"a", "m\x00", "messageID"}, {"a", "\xc3\x28", "messageID"},
	} {
		err := pgx.BeginFunc(e.ctx, e.Pool, func(tx pgx.Tx) error {
			first, err := e.Record(e.ctx, tx, c.consumer, c.id)
			if first || err == nil || !strings.Contains(err.Error(), c.want+": ") {
				t.Errorf("%q %q: %v, %v", c.consumer, c.id, first, err)
			}
			_, err = tx.Exec(e.ctx, "SELECT 1") // still usable
			return err
		})
		if err != nil {
			t.Error(err)
		}
		for _, entry := range []func() (bool, error){
			func() (bool, error) {
				return e.Handle(e.ctx, e.Pool, c.consumer, c.id, func(context.Context, pgx.Tx) error { return nil })
			},
			func() (bool, error) {
				return e.HandleSQL(e.ctx, &sql.DB{}, c.consumer, c.id, func(context.Context, *sql.Tx) error { return nil })
			},
			func() (bool, error) { return e.RecordSQL(e.ctx, &sql.Tx{}, c.consumer, c.id) },
		} {
			if first, err := entry(); first || err == nil || !strings.Contains(err.Error(), c.want+": ") {
				t.Errorf("%q %q: %v, %v", c.consumer, c.id, first, err)
			}
		}
	}
	for _, id := range []string{strings.Repeat(`"`, 255), strings.Repeat("é", 127), "\\'; DROP TABLE x"} {
		first, err := e.Handle(e.ctx, e.Pool, ok, id, func(context.Context, pgx.Tx) error { return nil })
		if !first || err != nil {
			t.Errorf("%q: %v, %v", id, first, err)
		}
	}
}

func TestNilIsRefused(t *testing.T) {
	t.Parallel()
	ctx := testenv.Context(t)
	var noTx *pgxpool.Tx
	fn := func(context.Context, pgx.Tx) error { return nil }
	fnSQL := func(context.Context, *sql.Tx) error { return nil }
	for name, call := range map[string]func() (bool, error){
		"Record":         func() (bool, error) { return inbox.Record(ctx, nil, "c", "m") },
		"Record typed":   func() (bool, error) { return inbox.Record(ctx, noTx, "c", "m") },
		"RecordSQL":      func() (bool, error) { return inbox.RecordSQL(ctx, nil, "c", "m") },
		"Handle db":      func() (bool, error) { return inbox.Handle(ctx, nil, "c", "m", fn) },
		"Handle fn":      func() (bool, error) { return inbox.Handle(ctx, &pgxpool.Pool{}, "c", "m", nil) },
		"HandleSQL db":   func() (bool, error) { return inbox.HandleSQL(ctx, nil, "c", "m", fnSQL) },
		"HandleSQL fn":   func() (bool, error) { return inbox.HandleSQL(ctx, &sql.DB{}, "c", "m", nil) },
		"Prune":          func() (bool, error) { _, err := inbox.Prune(ctx, nil, time.Hour); return false, err },
		"Prune negative": func() (bool, error) { _, err := inbox.Prune(ctx, &pgxpool.Pool{}, -1); return false, err },
		"Prune zero":     func() (bool, error) { _, err := inbox.Prune(ctx, &pgxpool.Pool{}, 0); return false, err },
		"schema":         func() (bool, error) { return inbox.Recorder{Schema: "a.b"}.Handle(ctx, &pgxpool.Pool{}, "c", "m", fn) },
	} {
		if first, err := call(); first || err == nil {
			t.Errorf("%s: %v, %v", name, first, err)
		}
	}
}

func TestPruneForgetsWhatIsOldAndNotParked(t *testing.T) {
	t.Parallel()
	e := setup(t)
	// Two consumers with 2,500 messages each, every second of them two days old.
	e.exec(t, `INSERT INTO `+e.Table("inbox")+` (consumer, message_id, received_at)
		SELECT c, c || n, now() - make_interval(days => n % 2 * 2)
		FROM generate_series(1, 2500) AS n, unnest(ARRAY['a', 'b']) AS c`)
	for id, reason := range map[string]string{"a1": "retry", "a3": "blocked", "a5": "dead", "b1": "dead"} {
		e.exec(t, `INSERT INTO `+e.Table("inbox_parked")+` (consumer, message_id, reason, due_at)
			VALUES ('a', $1, $2::text, CASE WHEN $2::text = 'retry' THEN now() END)`, id, reason)
	}
	pruned, err := e.Prune(e.ctx, e.Pool, 24*time.Hour)
	if err != nil || pruned != 2500-3 {
		t.Fatalf("pruned %d, %v", pruned, err)
	}
	if n := e.count(t, "inbox", "received_at > now() - interval '1 day'"); n != 2500 {
		t.Errorf("%d young ones left", n)
	}
	if n := e.count(t, "inbox", "message_id IN ('a1', 'a3', 'a5')"); n != 3 {
		t.Errorf("%d parked ones left", n)
	}
	if n := e.count(t, "inbox", "message_id = 'b1'"); n != 0 {
		t.Error("one that another consumer parked was spared")
	}
}

func TestConcurrentPrunesDoNotDisturbEachOther(t *testing.T) {
	t.Parallel()
	e := setup(t)
	e.exec(t, `INSERT INTO `+e.Table("inbox")+` (consumer, message_id, received_at)
		SELECT 'c', n::text, now() - interval '1 day' FROM generate_series(1, 5000) AS n`)
	db := e.pool(t, e.serializable(t))
	counts := make(chan int64, 4)
	var group errgroup.Group
	for range cap(counts) {
		group.Go(func() error {
			n, err := e.Prune(e.ctx, db, time.Hour)
			counts <- n
			return err
		})
	}
	if err := group.Wait(); err != nil {
		t.Fatal(err)
	}
	var total int64
	for range cap(counts) {
		total += <-counts
	}
	if left := e.count(t, "inbox", "true"); total != 5000 || left != 0 {
		t.Errorf("pruned %d, left %d", total, left)
	}
}
