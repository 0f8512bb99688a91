package inbox

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/txbox/txbox/internal/dbschema"
	"github.com/txbox/txbox/internal/rabbit"
	"github.com/txbox/txbox/internal/wire"
)

// ErrSchema is returned by Run when the database was migrated by a newer program
// that no longer serves this one.
var ErrSchema = dbschema.ErrIncompatible

// Config is what a Consumer may be told. The zero value works.
type Config struct {
	// Name is the consumer's name in the tables: messages are recorded per name. To
	// change it is to receive every message that comes again as new; set it before
	// you rename a queue. 1 to 100 bytes; default the queue.
	Name string
	// Schema is the database schema of txbox's tables; default "txbox".
	Schema string
	// Prefetch is how many deliveries RabbitMQ sends ahead, and so the most that are
	// held in memory; no less than Batch, at most 65,535, default 100 or, if that is more, two
	// batches for each worker.
	Prefetch int
	// Workers is how many messages are handled at the same time, each in a
	// transaction on a connection of its own; less than the pool's MaxConns, default
	// 4 or as many as that allows.
	Workers int
	// Batch is how many messages may share a transaction, of those that have been
	// delivered: nothing waits for a batch to fill. Several times faster, for Handlers
	// whose only effects are in tx: when one fails, those before it are handled again.
	// Default 1, at most 10,000.
	Batch int
	// Timeout is how long a Handler may take, and what the Handlers of one transaction
	// have left in its Pipeline, and COMMIT; default 30 s, at most 24 h.
	Timeout time.Duration
	// StopTimeout is how long Run waits for Handlers after its ctx has ended, before
	// it ends theirs, and RabbitMQ delivers their messages again; default 20 s, at most
	// 24 h.
	StopTimeout time.Duration
	// MaxAttempts is how many failed attempts make a message dead; default 10.
	MaxAttempts int
	// Horizon is how long messages are remembered. One that was written longer ago is
	// parked as too_old when it comes, since its record may be gone; longer than any
	// message can wait in a queue or be sent again. Records are deleted a day later, in
	// small steps. Default 14 days, at least an hour.
	Horizon time.Duration
	// Before, if set, is called before the transaction of a message, with a ctx that ends
	// after Timeout, at least once for each message that is not recorded yet: the place to
	// call a payment provider, with m.ID as the idempotency key, while no transaction is
	// open. The values of the context that it returns reach the Handler; an error parks the
	// message like one of the Handler. Not together with Batch.
	Before func(ctx context.Context, m Message) (context.Context, error)
	// Setup declares queues, exchanges and bindings. It is called on every new
	// connection before consuming, with a channel of its own, and must be done
	// within 30 s; default: declare nothing.
	Setup func(*amqp.Channel) error
	// TLS is used for amqps:// URLs; default: verify against the system's roots.
	TLS *tls.Config
	// Credentials is asked at each dial; default: those in the URL.
	Credentials func(context.Context) (user, password string, err error)
	// AllowPlaintext permits amqp:// to a host that is not loopback; default no.
	AllowPlaintext bool
	// Logger gets one line per change of state, and one for each message that is parked:
	// up to twenty in 10 s for each reason, the next with the number of those that had
	// none as without_a_line; default slog.Default().
	Logger *slog.Logger
}

// Consumer receives the messages of one queue and gives each to a Handler, with
// one effect in the database per message.
type Consumer struct {
	db      *pgxpool.Pool
	dialer  *rabbit.Dialer
	queue   string
	handler Handler
	cfg     Config
	log     *slog.Logger

	said map[string]*lines // of parked messages, by reason

	running atomic.Bool
	// Between the connection and the workers: one queue for each worker, with the
	// messages whose key is that worker's, and a last one for messages without a
	// key, from which all take. Each has room for all that RabbitMQ sends ahead.
	queues []chan *delivery
	batch  batchSize
	due    chan dueRow   // parked messages to handle again
	wake   chan struct{} // one more message is parked

	receiving, database side

	mu         sync.Mutex
	stats      Stats
	reconnects bool // the next connection is not the first
}

// NewConsumer checks everything that can be checked without a network, and
// reports all problems at once; each names the parameter or field of Config.
//
// amqpURL is one URL or a comma-separated list of whole URLs, tried in turn.
// The queue must exist, or be declared by Config.Setup; until it does, Run waits.
// A Consumer uses up to Workers connections of db, and one more now and then; a
// Handler that takes further ones needs a pool that has them.
func NewConsumer(db *pgxpool.Pool, amqpURL, queue string, h Handler, cfg Config) (*Consumer, error) {
	var problems []error
	if db == nil {
		problems = append(problems, errors.New("db: is nil"))
	}
	if h == nil {
		problems = append(problems, errors.New("h: is nil"))
	}
	if err := checkName("queue", queue, wire.MaxShortString); err != nil {
		problems = append(problems, err)
	}
	problems = append(problems, cfg.complete(db, queue)...)
	dialer, err := rabbit.NewDialer(amqpURL, rabbit.Config{
		Name: cfg.Name, TLS: cfg.TLS, Credentials: cfg.Credentials, AllowPlaintext: cfg.AllowPlaintext,
	})
	if err != nil {
		problems = append(problems, fmt.Errorf("amqpURL: %w", err))
	}
	if len(problems) > 0 {
		return nil, fmt.Errorf("inbox: %w", errors.Join(problems...))
	}
	c := &Consumer{
		db: db, dialer: dialer, queue: queue, handler: h, cfg: cfg,
		log:    cfg.Logger.With("consumer", cfg.Name, "queue", queue),
		queues: make([]chan *delivery, cfg.Workers+1),
		due:    make(chan dueRow), wake: make(chan struct{}, 1),
		stats: Stats{Parked: make(map[string]uint64)}, said: newLines(),
	}
	for _, reason := range []string{reasonRetry, reasonBlocked, reasonDead, reasonMissingID, reasonBadID, reasonConflict, reasonTooOld} {
		c.stats.Parked[reason] = 0
	}
	c.batch.now, c.batch.most = cfg.Batch, cfg.Batch
	for i := range c.queues {
		c.queues[i] = make(chan *delivery, cfg.Prefetch)
	}
	c.receiving.works, c.database.works = "inbox: receiving messages", "inbox: the database is back"
	c.receiving.Store(&waiting{"Run", errors.New("it was not called")})
	return c, nil
}

// complete sets what is not set, and returns what cannot be.
func (cfg *Config) complete(db *pgxpool.Pool, queue string) (problems []error) {
	if cfg.Name == "" {
		cfg.Name = queue
	}
	if err := checkName("Name", cfg.Name, maxConsumer); err != nil && cfg.Name != "" {
		problems = append(problems, err)
	}
	schema, err := dbschema.Name(cfg.Schema)
	if err != nil {
		problems = append(problems, fieldError("Schema", "%w", err))
	}
	cfg.Schema = schema
	maxWorkers := math.MaxInt32
	if db != nil {
		maxWorkers = int(db.Stat().MaxConns()) - 1
	}
	if maxWorkers < 1 {
		problems = append(problems, errors.New("db: a Consumer needs 2 connections at least, MaxConns is 1"))
		maxWorkers = math.MaxInt32
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.Default()
	}
	return append(problems, cfg.completeNumbers(maxWorkers)...)
}

func (cfg *Config) completeNumbers(maxWorkers int) (problems []error) {
	number := func(field string, value *int, usual, limit int) {
		if *value == 0 {
			*value = usual
		}
		if *value < 0 || *value > limit {
			problems = append(problems, fieldError(field, "%d is not one of 1 to %d", *value, limit))
		}
	}
	if cfg.Workers > maxWorkers {
		problems = append(problems, fieldError("Workers", "%d need a pool with MaxConns of at least %d, not %d", cfg.Workers, cfg.Workers+1, maxWorkers+1))
	} else {
		number("Workers", &cfg.Workers, min(4, maxWorkers), maxWorkers)
	}
	number("Batch", &cfg.Batch, 1, maxBatch)
	number("Prefetch", &cfg.Prefetch, min(max(100, 2*cfg.Workers*cfg.Batch), math.MaxUint16), math.MaxUint16)
	if cfg.Prefetch > 0 && cfg.Prefetch < cfg.Batch {
		problems = append(problems, fieldError("Prefetch", "%d is less than Batch, %d, which would never be full", cfg.Prefetch, cfg.Batch))
	}
	number("MaxAttempts", &cfg.MaxAttempts, 10, math.MaxInt32)
	if cfg.Before != nil && cfg.Batch > 1 {
		problems = append(problems, fieldError("Before", "is not called for batches; Batch must be 1"))
	}
	if cfg.Horizon == 0 {
		cfg.Horizon = 14 * 24 * time.Hour
	}
	if cfg.Horizon < time.Hour {
		problems = append(problems, fieldError("Horizon", "%s is less than an hour", cfg.Horizon))
	}
	for _, duration := range []struct {
		field string
		value *time.Duration
		usual time.Duration
	}{{"Timeout", &cfg.Timeout, 30 * time.Second}, {"StopTimeout", &cfg.StopTimeout, 20 * time.Second}} {
		if *duration.value == 0 {
			*duration.value = duration.usual
		}
		if *duration.value < 0 {
			problems = append(problems, fieldError(duration.field, "%s is negative", *duration.value))
		}
		if *duration.value > maxTimeout {
			problems = append(problems, fieldError(duration.field, "%s is more than %s", *duration.value, maxTimeout))
		}
	}
	return problems
}

const maxBatch = 10_000

// maxTimeout, with what is added to it, fits PostgreSQL's 31 bits of milliseconds.
const maxTimeout = 24 * time.Hour

func fieldError(field, format string, args ...any) error {
	return fmt.Errorf("%s: %w", field, fmt.Errorf(format, args...))
}

// Run receives messages until ctx ends, and then returns nil: it stops receiving,
// lets Handlers finish for at most Config.StopTimeout, and gives back to RabbitMQ
// what was not begun. All goroutines have ended when it returns: a Handler that does
// not heed its ctx delays that, a database that is silent by up to 10 s. A database
// or broker that is away or refuses is waited for, with a log line; only ErrSchema is
// returned, and at once an error if the Name is in use for another queue of this process.
func (c *Consumer) Run(ctx context.Context) error {
	if !c.running.CompareAndSwap(false, true) {
		return errors.New("inbox: the Consumer is running already")
	}
	defer c.running.Store(false)
	endName, err := c.useName()
	if err != nil {
		return err
	}
	defer endName()
	c.receiving.Store(&waiting{"the first connection", errors.New("not made yet")})
	ctx, stop := context.WithCancel(ctx)
	work, abort := context.WithCancel(context.WithoutCancel(ctx))
	defer abort()
	var workers sync.WaitGroup
	for _, own := range c.queues[:c.cfg.Workers] {
		workers.Go(func() { c.work(ctx, work, own) })
	}
	workers.Go(func() { c.watchDue(ctx) })
	workers.Go(func() { c.pruneOld(ctx) })

	finish := func() {
		stop()
		defer time.AfterFunc(c.cfg.StopTimeout, abort).Stop()
		workers.Wait()
	}
	err = c.receive(ctx, finish)
	finish()
	c.receiving.Store(&waiting{"Run", errors.New("it has returned")})
	return err
}

// Ready returns nil if messages are being received and the database takes them,
// otherwise what the Consumer waits for. It does not block.
func (c *Consumer) Ready() error {
	var errs []error
	for _, s := range []*side{&c.receiving, &c.database} {
		if w := s.Load(); w != nil {
			errs = append(errs, w)
		}
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("inbox: %w", err)
	}
	return nil
}

// side is one of the two that a consumer stands on.
type side struct {
	atomic.Pointer[waiting]        // nil: it works
	works                   string // what to log then
}

// waiting is what a side waits for, and why.
type waiting struct {
	what string
	err  error
}

func (w *waiting) Error() string { return "waiting for " + w.what + ": " + w.err.Error() }
func (w *waiting) Unwrap() error { return w.err }

// report notes what a side waits for, nil for nothing, and logs it if it is news.
func (c *Consumer) report(s *side, now *waiting) {
	before := s.Swap(now)
	switch {
	case now != nil && (before == nil || before.what != now.what):
		c.log.Warn("inbox: waiting for "+now.what, "error", now.err)
	case now == nil && before != nil:
		c.log.Info(s.works)
	}
}

// Stats counts since NewConsumer.
type Stats struct {
	Applied    uint64            // messages whose effects were committed
	Duplicates uint64            // deliveries of messages recorded before, dropped
	Failures   uint64            // attempts that failed
	Parked     map[string]uint64 // messages parked, by reason: retry, blocked, dead, missing_id, bad_id, id_conflict, too_old
	Pruned     uint64            // records that were deleted, since they were older than Config.Horizon
	Reconnects uint64            // connections to RabbitMQ after the first
	Connected  bool              // messages are being received
}

// Stats returns the counters. It does not ask the database.
func (c *Consumer) Stats() Stats {
	c.mu.Lock()
	defer c.mu.Unlock()
	stats := c.stats
	stats.Parked = make(map[string]uint64, len(c.stats.Parked))
	for reason, n := range c.stats.Parked {
		stats.Parked[reason] = n
	}
	stats.Connected = c.receiving.Load() == nil
	return stats
}

func (c *Consumer) count(add func(*Stats)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	add(&c.stats)
}
