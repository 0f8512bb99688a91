package relay

import (
	"context"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/txbox/txbox/internal/servers/serverstest"
	"github.com/txbox/txbox/internal/testenv"
	"github.com/txbox/txbox/outbox"
)

// newRelay returns a relay that does nothing by itself, but may own lanes.
func newRelay(t *testing.T, db *pgxpool.Pool, schema string) *Relay {
	t.Helper()
	pub, err := RabbitMQ(testenv.AMQPURL(t), RabbitMQConfig{})
	if err != nil {
		t.Fatal(err)
	}
	r, err := New(db, pub, Config{Schema: schema, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	r.connected.Store(true)
	r.leases.useless = func() bool { return false }
	return r
}

// Rows can be seen before they are on disk. A page of them is used only when the log
// is there: a commit that merely draws a transaction id would not write it.
func TestPageIsOnDiskBeforeItIsUsed(t *testing.T) {
	t.Parallel()
	server := serverstest.Postgres(t)
	db := testenv.SchemaAt(t, server.URL())
	ctx := testenv.Context(t)
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, statement := range []string{
		"ALTER SYSTEM SET wal_writer_delay = '10s'", "ALTER SYSTEM SET wal_writer_flush_after = '1GB'", "SELECT pg_reload_conf()",
	} {
		_, err := db.Exec(ctx, statement)
		must(err)
	}
	r := newRelay(t, db.Pool, db.Schema)
	must(r.leases.once(ctx, true))
	ids := r.reader.lanes()
	read := 0
	for i := range 30 {
		r.reader.loaded = i%2 == 0 // both ways of reading
		var pending bool
		must(pgx.BeginFunc(ctx, db, func(tx pgx.Tx) error {
			if _, err := tx.Exec(ctx, "SET LOCAL synchronous_commit = off"); err != nil {
				return err
			}
			return outbox.Writer{Schema: db.Schema}.Write(ctx, tx, outbox.Message{RoutingKey: "q"})
		}))
		must(db.QueryRow(ctx, "SELECT pg_current_wal_flush_lsn() < pg_current_wal_insert_lsn()").Scan(&pending))
		p, err := r.reader.readPage(ctx, ids)
		must(err)
		if len(p.messages) != i+1 {
			t.Fatalf("%d of %d messages read", len(p.messages), i+1)
		}
		var flushed bool
		must(db.QueryRow(ctx, "SELECT pg_current_wal_flush_lsn() >= $1::pg_lsn", p.position).Scan(&flushed))
		if !flushed {
			t.Errorf("read %d: used before it was on disk", i)
		}
		if pending {
			read++
		}
	}
	if read == 0 {
		t.Error("all was on disk at once, so this test shows nothing")
	}
}

// onPage calls a function when the next page has been read.
type onPage struct{ call func() }

type isPage struct{}

func (h *onPage) TraceQueryStart(ctx context.Context, _ *pgx.Conn, q pgx.TraceQueryStartData) context.Context {
	return context.WithValue(ctx, isPage{}, strings.Contains(q.SQL, "WITH page AS"))
}

func (h *onPage) TraceQueryEnd(ctx context.Context, _ *pgx.Conn, _ pgx.TraceQueryEndData) {
	if call := h.call; call != nil && ctx.Value(isPage{}) == true {
		h.call = nil
		call()
	}
}

// A page shows that one of two transactions has ended which may fill some gaps. The
// other commits while those are read. What it wrote into them is not taken before what
// it wrote earlier, into a gap that was its alone.
func TestPageAndGapsAreOneSnapshot(t *testing.T) {
	t.Parallel()
	db, hook := testenv.Schema(t), &onPage{}
	ctx := testenv.Context(t)
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	cfg, err := pgxpool.ParseConfig(db.URL)
	must(err)
	cfg.ConnConfig.Tracer = hook
	pool, err := pgxpool.NewWithConfig(ctx, cfg)
	must(err)
	defer pool.Close()
	r := newRelay(t, pool, db.Schema)
	must(r.leases.once(ctx, true))
	write := func(tx pgx.Tx, key string, n int) {
		t.Helper()
		for range n {
			must(outbox.Writer{Schema: db.Schema}.Write(ctx, tx, outbox.Message{RoutingKey: "q", Key: key}))
		}
	}
	read := func() {
		t.Helper()
		_, err := r.reader.once(ctx)
		must(err)
	}
	// others makes the reader pass over what is not committed, and learn who may do so.
	others := func() {
		t.Helper()
		must(pgx.BeginFunc(ctx, db, func(tx pgx.Tx) error { write(tx, "", 1); return nil }))
		read()
		must(pause(ctx, gapMoment+50*time.Millisecond))
		read()
	}
	slow, err := db.Begin(ctx)
	must(err)
	defer slow.Rollback(ctx)
	write(slow, "k", 1)
	others()
	short, err := db.Begin(ctx)
	must(err)
	defer short.Rollback(ctx)
	write(short, "", 1)
	write(slow, "k", 4)
	others()
	if n := len(r.reader.gaps.groups); n != 2 || !r.reader.gaps.groups[1].settled {
		t.Fatalf("%d groups of gaps; this test shows nothing", n)
	}

	must(short.Rollback(ctx))
	r.reader.loaded = true // it reads in a transaction at once
	hook.call = func() { must(slow.Commit(ctx)) }
	read()
	read()
	for _, m := range r.hand.take(pageRows) {
		if m.key == "k" && m.id != 1 {
			t.Errorf("message %d of the key goes first", m.id)
		}
	}
	if l := r.hand.lines["k"]; l == nil || l.unsettled != 5 {
		t.Errorf("not all of the key was read: %+v", l)
	}
}
