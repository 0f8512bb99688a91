package relay

import (
	"context"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

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

// steps is a relay with all lanes that goes on step by step.
type steps struct {
	*testing.T
	*Relay
	ctx  context.Context
	db   *testenv.DB
	hook *onPage
}

func newSteps(t *testing.T) *steps {
	t.Helper()
	s := &steps{T: t, ctx: testenv.Context(t), db: testenv.Schema(t), hook: &onPage{}}
	cfg, err := pgxpool.ParseConfig(s.db.URL)
	s.must(err)
	cfg.ConnConfig.Tracer = s.hook
	pool, err := pgxpool.NewWithConfig(s.ctx, cfg)
	s.must(err)
	t.Cleanup(pool.Close)
	s.Relay = newRelay(t, pool, s.db.Schema)
	s.must(s.leases.once(s.ctx, true))
	return s
}

func (s *steps) must(err error) {
	s.Helper()
	if err != nil {
		s.Fatal(err)
	}
}

// begin opens a transaction that ends with the test.
func (s *steps) begin() pgx.Tx {
	s.Helper()
	tx, err := s.db.Begin(s.ctx)
	s.must(err)
	s.Cleanup(func() { tx.Rollback(context.Background()) })
	return tx
}

func (s *steps) write(tx pgx.Tx, key string, n int) {
	s.Helper()
	for range n {
		s.must(outbox.Writer{Schema: s.db.Schema}.Write(s.ctx, tx, outbox.Message{RoutingKey: "q", Key: key}))
	}
}

func (s *steps) commit(key string, n int) {
	s.Helper()
	tx := s.begin()
	s.write(tx, key, n)
	s.must(tx.Commit(s.ctx))
}

func (s *steps) read() {
	s.Helper()
	_, err := s.reader.once(s.ctx)
	s.must(err)
}

// settle writes what is to be settled.
func (s *steps) settle() {
	s.Helper()
	confirmed, refused := s.hand.toSettle(settleRows)
	s.must(s.settler.delete(s.ctx, confirmed))
	s.must(s.settler.park(s.ctx, refused))
}

// passGap commits a message, so that what was not committed before is a gap, and reads
// until it is known who may fill it.
func (s *steps) passGap() {
	s.Helper()
	s.commit("", 1)
	s.read()
	s.must(pause(s.ctx, gapMoment+50*time.Millisecond))
	s.read()
}

// first returns the id of the message of a key that may go out first, 0 if none may.
func (s *steps) first(key string) int64 {
	s.Helper()
	for _, m := range s.hand.take(pageRows) {
		if m.key == key {
			return m.id
		}
	}
	return 0
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
	s := newSteps(t)
	slow := s.begin()
	s.write(slow, "k", 1)
	s.passGap()
	short := s.begin()
	s.write(short, "", 1)
	s.write(slow, "k", 4)
	s.passGap()
	if groups := s.reader.gaps.groups; len(groups) != 2 || !groups[1].settled {
		t.Fatalf("gaps %+v; this test shows nothing", groups)
	}

	s.must(short.Rollback(s.ctx))
	s.reader.loaded = true // it reads in a transaction at once
	s.hook.call = func() { s.must(slow.Commit(s.ctx)) }
	s.read()
	s.read()
	if id := s.first("k"); id != 1 {
		t.Errorf("message %d of the key goes first", id)
	}
	if l := s.hand.lines["k"]; l == nil || l.unsettled != 5 {
		t.Errorf("not all of the key was read: %+v", l)
	}
}

// A transaction that has written two messages of a key commits while the scan is between
// their ids.
func TestScanTakesNothingOutOfAGap(t *testing.T) {
	t.Parallel()
	for name, commitAt := range map[string]func(s *steps, commit func()){
		"a lane that is newly ours": func(s *steps, commit func()) {
			s.must(s.leases.release(s.ctx, s.leases.identity(), []int16{0}, false))
			s.must(s.leases.once(s.ctx, true))
			s.read() // up to scanStep
			commit()
			s.read()
		},
		"now and then": func(s *steps, commit func()) {
			s.reader.scan = scan{at: scanStep, step: scanStep}
			ours := s.reader.lanes()
			_, err := s.reader.readNew(s.ctx, ours)
			s.must(err)
			commit()
			_, err = s.reader.readOld(s.ctx, ours)
			s.must(err)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newSteps(t)
			slow := s.begin()
			s.write(slow, "k", 1)
			_, err := s.db.Exec(s.ctx, "SELECT setval('"+s.db.Schema+".outbox_id_seq', $1)", scanStep*3/2)
			s.must(err)
			s.write(slow, "k", 1)
			s.passGap()
			commitAt(s, func() { s.must(slow.Commit(s.ctx)) })
			if id := s.first("k"); id > 1 {
				t.Fatalf("message %d of the key goes first", id)
			}
			s.read()
			s.read()
			if l := s.hand.lines["k"]; l == nil || l.unsettled != 2 {
				t.Errorf("not all of the key was read: %+v", l)
			}
		})
	}
}

// All lanes are lost while some are read from their first message, and come back.
func TestLanesThatComeBackDuringAScanAreRead(t *testing.T) {
	t.Parallel()
	s := newSteps(t)
	s.commit("", 1)
	_, err := s.db.Exec(s.ctx, "SELECT setval('"+s.db.Schema+".outbox_id_seq', $1)", 5*scanStep)
	s.must(err)
	s.commit("", 1)
	s.read()
	s.must(s.leases.release(s.ctx, s.leases.identity(), []int16{0}, false))
	s.must(s.leases.once(s.ctx, true))
	s.read()
	if at := s.reader.scan.at; at == 0 || at >= s.reader.floor {
		t.Fatalf("the scan is at %d; this test shows nothing", at)
	}
	s.must(s.leases.retire(s.ctx))
	for _, m := range s.hand.take(10) {
		s.hand.drop(m)
	}
	s.must(s.leases.once(s.ctx, true))
	for range 20 {
		s.read()
	}
	if n := len(s.hand.take(10)); n != 2 {
		t.Errorf("%d of 2 messages were read again", n)
	}
}

// A lease ends before a refusal is written, so that it comes to nothing, and the lane is
// ours again. The message is read before those that follow it.
func TestRefusalThatCameTooLateIsForgotten(t *testing.T) {
	t.Parallel()
	s := newSteps(t)
	s.commit("k", 1)
	s.read()
	for _, m := range s.hand.take(1) {
		s.refuse(m, returned, "returned")
	}
	s.must(s.leases.retire(s.ctx))
	s.must(s.leases.once(s.ctx, true))
	s.read() // not this lane, while the verdict is in the hand
	s.settle()
	s.commit("k", 1)
	for range 3 {
		s.read()
	}
	if id := s.first("k"); id != 1 {
		t.Errorf("message %d of the key goes first", id)
	}
}
